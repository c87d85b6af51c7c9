//! What the queue is made of. Under loom: its own types, and plain lists behind its locks for the queues of crossbeam, which loom cannot
//! look into. What is modelled is what is done with them, and the stations.

#[cfg(loom)]
pub(super) use self::modelled::*;
#[cfg(not(loom))]
pub(super) use self::real::*;

#[cfg(not(loom))]
mod real {
    pub(in crate::queue) use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
    pub(in crate::queue) use std::sync::{Arc, Condvar, Mutex};

    pub(in crate::queue) use crossbeam_queue::{ArrayQueue as Bounded, SegQueue as Unbounded};
}

#[cfg(loom)]
mod modelled {
    use std::collections::VecDeque;

    pub(in crate::queue) use loom::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
    pub(in crate::queue) use loom::sync::{Arc, Condvar, Mutex};

    /// As `ArrayQueue`.
    pub(in crate::queue) struct Bounded<T> {
        length: usize,
        list: Mutex<VecDeque<T>>,
    }

    impl<T> Bounded<T> {
        pub(in crate::queue) fn new(length: usize) -> Self {
            Bounded { length, list: Mutex::new(VecDeque::new()) }
        }

        pub(in crate::queue) fn push(&self, value: T) -> Result<(), T> {
            let mut list = self.list.lock().unwrap();
            if list.len() == self.length {
                return Err(value);
            }
            list.push_back(value);
            Ok(())
        }

        pub(in crate::queue) fn pop(&self) -> Option<T> {
            self.list.lock().unwrap().pop_front()
        }

        pub(in crate::queue) fn len(&self) -> usize {
            self.list.lock().unwrap().len()
        }
    }

    /// As `SegQueue`.
    pub(in crate::queue) struct Unbounded<T>(Bounded<T>);

    impl<T> Unbounded<T> {
        pub(in crate::queue) fn new() -> Self {
            Unbounded(Bounded::new(usize::MAX))
        }

        pub(in crate::queue) fn push(&self, value: T) {
            let _ = self.0.push(value);
        }

        pub(in crate::queue) fn pop(&self) -> Option<T> {
            self.0.pop()
        }

        pub(in crate::queue) fn len(&self) -> usize {
            self.0.len()
        }
    }
}
