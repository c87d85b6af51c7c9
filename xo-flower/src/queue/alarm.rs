//! Wakes the worker.

use std::sync::PoisonError;

use super::sync::{Condvar, Mutex};

/// Stays rung until it is heard: what is rung for before somebody waits is not lost.
pub(super) struct Alarm {
    rung: Mutex<bool>,
    bell: Condvar,
}

impl Alarm {
    pub(super) fn new() -> Alarm {
        Alarm { rung: Mutex::new(false), bell: Condvar::new() }
    }

    pub(super) fn ring(&self) {
        *self.rung.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.notify_one();
    }

    /// Until it is rung, or was since the last time.
    pub(super) fn wait(&self) {
        let mut rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        while !*rung {
            rung = self.bell.wait(rung).unwrap_or_else(PoisonError::into_inner);
        }
        *rung = false;
    }
}
