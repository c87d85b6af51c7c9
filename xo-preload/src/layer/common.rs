//! What the processes have in common that share a connection after a fork: how often each direction has been used since, and
//! how many they are.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use xo_sys::raw;

use crate::{alone, conn};

/// Record layers in this process.
static LAYERS: AtomicUsize = AtomicUsize::new(0);

/// Which direction.
#[derive(Clone, Copy)]
pub(super) enum Direction {
    Receive = 0,
    Send = 1,
}

const HOLDERS: usize = 2;
const PAGE: usize = 4096;

/// A page of memory that children share with their parent.
pub(super) struct Common {
    page: *mut AtomicU32,
    /// As of this process: how often each direction has been used since the first fork.
    turns: [AtomicU32; 2],
    /// See [`alone::forks`].
    forks: u32,
}

// SAFETY: the memory consists of atomics only.
unsafe impl Send for Common {}
// SAFETY: as above.
unsafe impl Sync for Common {}

impl Common {
    pub(super) fn new() -> Option<Common> {
        let page = raw::map_common().ok()?.cast();
        LAYERS.fetch_add(1, Ordering::Relaxed);
        let common = Common { page, turns: [AtomicU32::new(0), AtomicU32::new(0)], forks: alone::forks() };
        common.word(HOLDERS)?.store(1, Ordering::Relaxed);
        Some(common)
    }

    fn word(&self, index: usize) -> Option<&AtomicU32> {
        // SAFETY: a page, mapped as long as `self` lives; the index is one of three.
        unsafe { self.page.add(index).as_ref() }
    }

    /// Has the process forked since it got the connection?
    pub(super) fn is_shared(&self) -> bool {
        self.forks != alone::forks()
    }

    /// This process is about to use a direction, whose lock it holds. `false`: another has since the fork.
    pub(super) fn claim(&self, direction: Direction) -> bool {
        if !self.is_shared() {
            return true;
        }
        let index = direction as usize;
        let (Some(turn), Some(all)) = (self.turns.get(index), self.word(index)) else { return false };
        let now = turn.load(Ordering::Relaxed);
        let next = now.wrapping_add(1);
        let claimed = all.compare_exchange(now, next, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if claimed {
            turn.store(next, Ordering::Relaxed);
        }
        claimed
    }

    /// This process gives the connection up; `true`: it was the last one.
    pub(super) fn leave(&self) -> bool {
        self.word(HOLDERS).is_some_and(|holders| holders.fetch_sub(1, Ordering::AcqRel) == 1)
    }

    fn join(&self) {
        if let Some(holders) = self.word(HOLDERS) {
            holders.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Drop for Common {
    fn drop(&mut self) {
        LAYERS.fetch_sub(1, Ordering::Relaxed);
        raw::unmap(self.page.cast(), PAGE);
    }
}

/// Before a fork: the child will have all connections, too.
pub(crate) extern "C" fn about_to_fork() {
    if LAYERS.load(Ordering::Relaxed) > 0 {
        conn::all().filter_map(|(_, conn)| conn.layer()).for_each(|layer| layer.common.join());
    }
}
