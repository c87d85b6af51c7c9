//! The slot table: memory shared between one process under the library and the daemon. The meaning of the
//! words stands in `xo_proto::slot`.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use memfd::{FileSeal, MemfdOptions};
use xo_proto::slot::{
    COUNTERS, DELIVERIES, DELIVERY_CLOSED, DELIVERY_FREE, DELIVERY_OPEN, FREE, MAGIC, PENDING, SLOTS,
    WAKE_PORTS,
};

use crate::raw::{self, Fd};

#[repr(C)]
struct Slot {
    /// State in the lower half, generation in the upper: a verdict on an earlier request cannot hit a later.
    word: AtomicU32,
}

const STATE: u32 = 0xffff;

/// Layout of the memory. Every word is an atomic: both sides may write whatever they like at any time.
#[repr(C)]
struct Table {
    magic: AtomicU32,
    size: AtomicU32,
    wake_ports: [AtomicU32; WAKE_PORTS],
    /// Followed connections that the process has accepted from their clients.
    followed: AtomicU32,
    /// Not 0: the process can go on with a connection that comes home with its TLS.
    answers: AtomicU32,
    counters: [AtomicU64; COUNTERS],
    slots: [Slot; SLOTS],
    deliveries: [AtomicU32; DELIVERIES],
}

const SIZE: usize = size_of::<Table>();
const _: () = assert!(offset_of!(Table, counters).is_multiple_of(8) && SIZE < u32::MAX as usize);

/// A mapped slot table. Numbers that come from the other side are checked on every use; none can panic.
pub struct SlotTable {
    table: NonNull<Table>,
}

// SAFETY: the memory consists of atomics only.
unsafe impl Send for SlotTable {}
// SAFETY: as above.
unsafe impl Sync for SlotTable {}

impl SlotTable {
    /// Makes a table; the descriptor is for the process that is to share it. The size is sealed, so neither
    /// side can make the other fault.
    ///
    /// # Errors
    /// Of memfd_create, ftruncate and mmap.
    pub fn create() -> io::Result<(SlotTable, std::os::fd::OwnedFd)> {
        let memory = MemfdOptions::default()
            .allow_sealing(true)
            .create("xo-slots")
            .map_err(|e| io::Error::other(e.to_string()))?;
        memory.as_file().set_len(SIZE as u64)?;
        memory
            .add_seals(&[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal])
            .map_err(|e| io::Error::other(e.to_string()))?;
        let mapped = Self::map_raw(memory.as_raw_fd())?;
        mapped.get().size.store(SIZE as u32, Ordering::Relaxed);
        mapped.get().magic.store(MAGIC, Ordering::Release);
        Ok((mapped, memory.into_file().into()))
    }

    /// Maps a table that the daemon has sent.
    ///
    /// # Errors
    /// Of fstat and mmap; `InvalidData` when it is not a slot table of this version.
    pub fn map(fd: RawFd) -> io::Result<SlotTable> {
        if raw::file_size(fd)? != SIZE as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mapped = Self::map_raw(fd)?;
        let table = mapped.get();
        if table.magic.load(Ordering::Acquire) != MAGIC || table.size.load(Ordering::Relaxed) != SIZE as u32 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(mapped)
    }

    fn map_raw(fd: RawFd) -> io::Result<SlotTable> {
        let address = raw::map_shared(fd, SIZE)?;
        NonNull::new(address.cast()).map(|table| SlotTable { table }).ok_or(io::ErrorKind::OutOfMemory.into())
    }

    fn get(&self) -> &Table {
        // SAFETY: mapped, `SIZE` bytes, for as long as `self` lives; atomics allow shared writes.
        unsafe { self.table.as_ref() }
    }

    /// Takes a slot for a request to the daemon: PENDING, with a new generation, which is returned.
    pub fn begin(&self, slot: u32) -> u32 {
        let Some(s) = self.get().slots.get(slot as usize) else { return 0 };
        let generation = (s.word.load(Ordering::Relaxed) | STATE).wrapping_add(1);
        s.word.store(generation | PENDING, Ordering::Release);
        generation
    }

    /// The slot's state word.
    pub fn state(&self, slot: u32) -> u32 {
        self.get().slots.get(slot as usize).map_or(FREE, |s| s.word.load(Ordering::Acquire) & STATE)
    }

    /// Sets the verdict, if the slot still waits for this one, and wakes who waits for it.
    pub fn decide(&self, slot: u32, generation: u32, state: u32) -> bool {
        let Some(s) = self.get().slots.get(slot as usize) else { return false };
        let (from, to) = (generation & !STATE | PENDING, generation & !STATE | state & STATE);
        let decided = s.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if decided {
            raw::futex_wake(&s.word);
        }
        decided
    }

    /// Sets the state whatever it was, and wakes who waits for it.
    pub fn set(&self, slot: u32, state: u32) {
        if let Some(s) = self.get().slots.get(slot as usize) {
            let generation = s.word.load(Ordering::Relaxed) & !STATE;
            s.word.store(generation | state & STATE, Ordering::Release);
            raw::futex_wake(&s.word);
        }
    }

    /// Waits while the slot is PENDING, at most `timeout`; returns the state word.
    pub fn wait(&self, slot: u32, timeout: Duration) -> u32 {
        let Some(s) = self.get().slots.get(slot as usize) else { return FREE };
        let mut left = timeout;
        loop {
            let word = s.word.load(Ordering::Acquire);
            if word & STATE != PENDING || left.is_zero() {
                return word & STATE;
            }
            let began = raw::monotonic();
            raw::futex_wait(&s.word, word, left);
            left = left.saturating_sub(raw::monotonic().saturating_sub(began));
        }
    }

    /// Gives a slot back.
    pub fn clear(&self, slot: u32) {
        if let Some(s) = self.get().slots.get(slot as usize) {
            s.word.fetch_and(!STATE, Ordering::AcqRel);
        }
    }

    /// Marks a delivery as given to the process.
    pub fn open_delivery(&self, delivery: u32) {
        self.set_delivery(delivery, DELIVERY_OPEN);
    }

    /// Marks a delivery as closed by the process.
    pub fn close_delivery(&self, delivery: u32) {
        self.set_delivery(delivery, DELIVERY_CLOSED);
    }

    /// Marks a delivery as not in use.
    pub fn free_delivery(&self, delivery: u32) {
        self.set_delivery(delivery, DELIVERY_FREE);
    }

    /// The delivery's state word.
    pub fn delivery(&self, delivery: u32) -> u32 {
        self.get().deliveries.get(delivery as usize).map_or(DELIVERY_FREE, |d| d.load(Ordering::Acquire))
    }

    fn set_delivery(&self, delivery: u32, word: u32) {
        if let Some(d) = self.get().deliveries.get(delivery as usize) {
            d.store(word, Ordering::Release);
        }
    }

    /// Adds one to a counter (a reason's number or a `xo_proto::slot::Counter`).
    pub fn count(&self, counter: usize) {
        self.add(counter, 1);
    }

    /// Adds `n` to a counter.
    pub fn add(&self, counter: usize, n: u64) {
        if let Some(c) = self.get().counters.get(counter) {
            c.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// A counter's value.
    pub fn counter(&self, counter: usize) -> u64 {
        self.get().counters.get(counter).map_or(0, |c| c.load(Ordering::Relaxed))
    }

    /// Whether the process can go on with a connection that comes with its TLS although its server begins with a handshake.
    pub fn set_answers_for_tls(&self, can: bool) {
        self.get().answers.store(can.into(), Ordering::Relaxed);
    }

    /// Can it?
    #[must_use]
    pub fn answers_for_tls(&self) -> bool {
        self.get().answers.load(Ordering::Relaxed) != 0
    }

    /// Says how many connections the process follows that it has accepted from their clients.
    pub fn set_followed(&self, n: u32) {
        self.get().followed.store(n, Ordering::Relaxed);
    }

    /// How many it follows.
    pub fn followed(&self) -> u32 {
        self.get().followed.load(Ordering::Relaxed)
    }

    /// Announces the source port of a wake-up connection; `false` when the list is full.
    pub fn add_wake_port(&self, port: u16) -> bool {
        self.swap_wake_port(0, port)
    }

    /// Takes an announcement back.
    pub fn remove_wake_port(&self, port: u16) {
        self.swap_wake_port(port, 0);
    }

    /// Is a wake-up connection under way from this local port?
    pub fn has_wake_port(&self, port: u16) -> bool {
        port != 0 && self.get().wake_ports.iter().any(|p| p.load(Ordering::Acquire) == u32::from(port))
    }

    fn swap_wake_port(&self, from: u16, to: u16) -> bool {
        self.get()
            .wake_ports
            .iter()
            .any(|p| p.compare_exchange(from.into(), to.into(), Ordering::AcqRel, Ordering::Relaxed).is_ok())
    }
}

impl Drop for SlotTable {
    fn drop(&mut self) {
        raw::unmap(self.table.as_ptr().cast(), SIZE);
    }
}

/// For tests and callers that hold an [`Fd`].
impl SlotTable {
    /// As [`SlotTable::map`].
    ///
    /// # Errors
    /// As [`SlotTable::map`].
    pub fn map_fd(fd: &Fd) -> io::Result<SlotTable> {
        Self::map(fd.as_raw_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn pair() -> (SlotTable, SlotTable) {
        let (daemon, fd) = SlotTable::create().expect("a table");
        let library = SlotTable::map(fd.as_fd().as_raw_fd()).expect("the same table");
        (daemon, library)
    }

    #[test]
    fn only_the_pending_generation_is_decided() {
        let (daemon, library) = pair();
        let old = library.begin(7);
        let new = library.begin(7);
        assert!(!daemon.decide(7, old, 2));
        assert_eq!(library.state(7), PENDING);
        assert!(daemon.decide(7, new, 2));
        assert!(!daemon.decide(7, new, 3), "a second verdict");
        assert_eq!(library.state(7), 2);
    }

    #[test]
    fn a_waiter_is_woken() {
        let (daemon, library) = pair();
        let generation = library.begin(0);
        std::thread::scope(|s| {
            let waiter = s.spawn(|| library.wait(0, Duration::from_secs(20)));
            assert!(daemon.decide(0, generation, 5));
            assert_eq!(waiter.join().expect("no panic"), 5);
        });
        library.begin(0);
        assert_eq!(library.wait(0, Duration::from_millis(5)), PENDING, "a time-out");
    }

    #[test]
    fn foreign_numbers_are_ignored() {
        let (daemon, library) = pair();
        for n in [SLOTS as u32, u32::MAX] {
            assert_eq!(library.begin(n), 0);
            assert!(!daemon.decide(n, 0, 1));
            daemon.open_delivery(n);
            assert_eq!(library.delivery(n), DELIVERY_FREE);
        }
        library.count(COUNTERS);
        assert_eq!(daemon.counter(COUNTERS), 0);
    }

    #[test]
    fn wake_ports_come_and_go() {
        let (daemon, library) = pair();
        for p in 1..=WAKE_PORTS as u16 {
            assert!(daemon.add_wake_port(p));
        }
        assert!(!daemon.add_wake_port(99));
        assert!(library.has_wake_port(3) && !library.has_wake_port(0));
        daemon.remove_wake_port(3);
        assert!(!library.has_wake_port(3) && daemon.add_wake_port(99));
    }

    #[test]
    fn another_file_is_not_a_table() {
        let file = std::fs::File::open("/proc/self/exe").expect("our binary");
        assert!(SlotTable::map(file.as_raw_fd()).is_err());
    }
}
