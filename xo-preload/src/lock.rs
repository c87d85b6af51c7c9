//! A lock without a libc symbol: the standard library's waits through `syscall`, which is a hook of ours.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use xo_sys::raw;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and somebody waits.
const WAITED_FOR: u32 = 2;
/// A waiter looks again after so long, whoever has forgotten it.
const LOOK: Duration = Duration::from_secs(1);

/// A value that one thread uses at a time. Not for signal handlers.
pub(crate) struct Lock<T> {
    word: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by who holds the lock.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    pub(crate) const fn new(value: T) -> Lock<T> {
        Lock { word: AtomicU32::new(FREE), value: UnsafeCell::new(value) }
    }

    /// Takes the lock.
    pub(crate) fn lock(&self) -> Locked<'_, T> {
        if self.word.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed).is_err() {
            while self.word.swap(WAITED_FOR, Ordering::Acquire) != FREE {
                raw::futex_wait(&self.word, WAITED_FOR, LOOK);
            }
        }
        Locked(self)
    }

    /// Takes the lock if nobody has it.
    pub(crate) fn try_lock(&self) -> Option<Locked<'_, T>> {
        let taken = self.word.compare_exchange(FREE, TAKEN, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok().then_some(Locked(self))
    }
}

/// The right to the value.
pub(crate) struct Locked<'l, T>(&'l Lock<T>);

impl<T> Deref for Locked<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the lock is held.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Locked<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the lock is held.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Locked<'_, T> {
    fn drop(&mut self) {
        if self.0.word.swap(FREE, Ordering::Release) == WAITED_FOR {
            raw::futex_wake(&self.0.word);
        }
    }
}
