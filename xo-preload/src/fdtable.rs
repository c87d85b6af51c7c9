//! What we know about each descriptor number: one word, read on every hooked call.

use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};

use xo_sys::raw;

/// Highest descriptor number that is looked after, plus one.
const MAX_FDS: usize = 1 << 20;
const LISTENER: u32 = 1 << 31;
const OTHER: u32 = 1 << 30;
const EPOLL: u32 = 1 << 29;

static TABLE: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static SIZE: AtomicUsize = AtomicUsize::new(0);

/// What a descriptor is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nothing.
    None,
    /// A listening socket on this tracked port.
    Listener(u16),
    /// Has been looked at, and is nothing to us.
    Other,
    /// An epoll instance in which the server waits for more than listening sockets.
    Epoll,
    /// A tracked connection, by its index in the connection table.
    Connection(u32),
}

/// Reserves the table; untouched pages cost nothing.
pub(crate) fn start() -> bool {
    let Ok(memory) = raw::map_private(MAX_FDS * size_of::<AtomicU32>()) else { return false };
    SIZE.store(MAX_FDS, Ordering::Relaxed);
    TABLE.store(memory.cast(), Ordering::Release);
    true
}

fn word(fd: i32) -> Option<&'static AtomicU32> {
    let index = usize::try_from(fd).ok().filter(|i| *i < SIZE.load(Ordering::Relaxed))?;
    let table = TABLE.load(Ordering::Acquire);
    // SAFETY: once set, the table is never unmapped, and the index is below its size.
    unsafe { table.add(index).as_ref() }
}

/// Is there a place for this number?
pub(crate) fn has_room_for(fd: i32) -> bool {
    word(fd).is_some()
}

/// Looks a descriptor up.
#[inline]
pub(crate) fn get(fd: i32) -> Entry {
    match word(fd).map_or(0, |w| w.load(Ordering::Acquire)) {
        0 => Entry::None,
        OTHER => Entry::Other,
        EPOLL => Entry::Epoll,
        w if w & LISTENER != 0 => Entry::Listener(w as u16),
        w => Entry::Connection(w - 1),
    }
}

/// Sets a descriptor's entry; returns the one before.
pub(crate) fn set(fd: i32, entry: Entry) -> Entry {
    let value = match entry {
        Entry::None => 0,
        Entry::Listener(port) => LISTENER | u32::from(port),
        Entry::Other => OTHER,
        Entry::Epoll => EPOLL,
        Entry::Connection(index) => index + 1,
    };
    let before = get(fd);
    if let Some(word) = word(fd) {
        word.store(value, Ordering::Release);
    }
    before
}

/// Descriptors that were nothing to us are looked at again: they may be something to a new policy.
pub(crate) fn forget_others() {
    let all = 0..i32::try_from(SIZE.load(Ordering::Relaxed)).unwrap_or(i32::MAX);
    for word in all.filter_map(word) {
        if word.load(Ordering::Relaxed) == OTHER {
            let _ = word.compare_exchange(OTHER, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}
