//! The connection table. An entry's index is also the number of its slot in the memory shared with the
//! daemon.
//!
//! An entry belongs to whoever has claimed its half (reading or writing). A claim never waits: a second
//! thread in the same half at the same time means that the stream cannot be followed, and the connection is
//! left alone from then on.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering,
};

use xo_proto::ipc::Deliver;
use xo_proto::protocol::{Protocol, Requests, Responses};
use xo_proto::reason::Reason;
use xo_proto::slot::{GONE, PENDING, SLOTS};
use xo_sys::raw;

use crate::layer::Layer;
use crate::lock::Lock;
use crate::mode::Mode;
use crate::{alone, daemon, fdtable, tls};

/// What is done about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// The entry is not in use.
    Free = 0,
    /// Followed; may be offloaded.
    Tracked = 1,
    /// Left alone for the rest of its life.
    Passive = 2,
}

/// A connection. All zero is a free entry.
pub(crate) struct Conn {
    kind: AtomicU8,
    /// Descriptors that refer to it.
    descriptors: AtomicU32,
    reading: AtomicBool,
    writing: AtomicBool,
    /// The daemon has been asked and its verdict not been seen.
    pub(crate) asked: AtomicBool,
    /// It is elsewhere; said by a slot table that is no longer in use.
    pub(crate) gone: AtomicBool,
    /// A descriptor of it, for waking the server.
    pub(crate) fd: AtomicI32,
    /// Whether its descriptors block.
    pub(crate) mode: Mode,
    /// When a head that is held back is let through, `CLOCK_MONOTONIC` ns; 0 for none.
    pub(crate) deadline: AtomicU64,
    /// The next request is held back until all responses are written.
    pub(crate) awaits_clean: AtomicBool,
    /// Port of the listening socket that it has come out of, if it was restored; 0: its socket's own.
    pub(crate) port: AtomicU16,
    /// Another machine has accepted it from its client.
    pub(crate) guest: AtomicBool,
    /// For a guest, its home's number on the board.
    pub(crate) home: AtomicU64,
    /// A choice among several machines has brought it here, or left it here.
    pub(crate) placed: AtomicBool,
    /// Moves so far on behalf of the request that comes next.
    pub(crate) moves: AtomicU8,
    /// Index of its delivery, if it was restored here; its closing is reported.
    delivery: AtomicU32,
    /// The daemon that gave it, see `daemon::epoch`.
    given_by: AtomicU32,
    /// See [`alone::forks`].
    forks: AtomicU32,
    /// Tells it from others that had the same entry.
    pub(crate) serial: AtomicU32,
    next_free: AtomicU32,
    /// It has come with its TLS: what the server reads and writes goes through this.
    layer: Lock<Option<Arc<Layer>>>,
    has_layer: AtomicBool,
    read: UnsafeCell<Option<ReadHalf>>,
    write: UnsafeCell<Option<WriteHalf>>,
}

// SAFETY: the two cells are touched only by who holds the claim of their half.
unsafe impl Sync for Conn {}

/// State of the reading half.
pub(crate) struct ReadHalf {
    /// Where in the request stream the server is.
    pub(crate) tracker: Requests,
    /// The next request is served here whatever the policy says.
    pub(crate) stays: bool,
    /// Length of an incomplete head when last looked at.
    pub(crate) partial: usize,
    /// A request has waited for the responses before it as long as it may.
    pub(crate) late: bool,
    /// It has had a request: no handshake comes any more.
    pub(crate) begun: bool,
    /// The client's records.
    pub(crate) tls: Option<Box<tls::Received>>,
}

/// State of the writing half.
#[derive(Default)]
pub(crate) struct WriteHalf {
    /// Whether everything has been answered.
    pub(crate) responses: Responses,
    /// The server's records.
    pub(crate) tls: Option<Box<tls::Sent>>,
}

impl ReadHalf {
    fn new(protocol: Protocol) -> ReadHalf {
        let tracker = Requests::new(protocol);
        ReadHalf { tracker, stays: false, partial: 0, late: false, begun: false, tls: None }
    }
}

/// No delivery: accepted from its client.
const NONE: u32 = u32::MAX;

static TABLE: AtomicPtr<Conn> = AtomicPtr::new(std::ptr::null_mut());
/// Head of the free list: index + 1 in the lower half, a counter against ABA in the upper.
static FREE: AtomicU64 = AtomicU64::new(0);
/// Entries below this have been used.
static USED: AtomicU32 = AtomicU32::new(0);

/// See [`followed`].
static FOLLOWED: AtomicU32 = AtomicU32::new(0);

/// Reserves the table.
pub(crate) fn start() -> bool {
    let Ok(memory) = raw::map_private(SLOTS * size_of::<Conn>()) else { return false };
    TABLE.store(memory.cast(), Ordering::Release);
    true
}

/// The entry with this index.
pub(crate) fn get(index: u32) -> Option<&'static Conn> {
    let table = TABLE.load(Ordering::Acquire);
    if table.is_null() || index as usize >= SLOTS {
        return None;
    }
    // SAFETY: mapped for good, within its size; all zero is a valid entry (`Option`s of None are written
    // before the kind says that the entry is in use).
    unsafe { table.add(index as usize).as_ref() }
}

/// Entries that may be in use.
pub(crate) fn all() -> impl Iterator<Item = (u32, &'static Conn)> {
    (0..USED.load(Ordering::Acquire)).filter_map(|i| Some((i, get(i)?)))
}

/// Connections for which the daemon has been asked, its verdict not seen yet.
pub(crate) fn waiting() -> impl Iterator<Item = (u32, &'static Conn)> {
    all()
        .filter(|(_, c)| c.asked.load(Ordering::Acquire) && matches!(c.kind(), Kind::Tracked | Kind::Passive))
}

/// The connection behind a descriptor, if it has an entry.
pub(crate) fn of(fd: i32) -> Option<&'static Conn> {
    match fdtable::get(fd) {
        fdtable::Entry::Connection(index) => get(index),
        _ => None,
    }
}

/// Starts to follow the connection behind a descriptor, accepted or delivered; `None` when the table is full, or its TLS
/// cannot be gone on with.
pub(crate) fn track(fd: i32, deliver: Option<&Deliver>, nonblocking: bool, protocol: Protocol) -> Option<()> {
    forget(fd);
    if !fdtable::has_room_for(fd) {
        return None;
    }
    let layer = match deliver.and_then(|d| Some((d.tls.as_ref()?, d.handshake))) {
        Some((tls, handshake)) => Some(Arc::new(Layer::new(tls, handshake)?)),
        None => None,
    };
    let index = take()?;
    let conn = get(index)?;
    conn.asked.store(false, Ordering::Relaxed);
    conn.gone.store(false, Ordering::Relaxed);
    conn.deadline.store(0, Ordering::Relaxed);
    conn.awaits_clean.store(false, Ordering::Relaxed);
    conn.mode.begin(nonblocking);
    conn.fd.store(fd, Ordering::Relaxed);
    conn.port.store(0, Ordering::Relaxed);
    conn.guest.store(deliver.is_some_and(|d| d.guest), Ordering::Relaxed);
    conn.home.store(deliver.map_or(0, |d| d.home), Ordering::Relaxed);
    conn.placed.store(deliver.is_some(), Ordering::Relaxed);
    conn.moves.store(deliver.map_or(0, |d| d.moves), Ordering::Relaxed);
    conn.delivery.store(deliver.map_or(NONE, |d| d.delivery), Ordering::Relaxed);
    conn.given_by.store(daemon::epoch(), Ordering::Relaxed);
    conn.forks.store(alone::forks(), Ordering::Relaxed);
    conn.descriptors.store(1, Ordering::Relaxed);
    conn.has_layer.store(layer.is_some(), Ordering::Relaxed);
    *conn.layer.lock() = layer;
    conn.serial.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the entry was free: nobody else refers to it. What the halves own is dropped when an entry is freed, so
    // overwriting without a drop loses nothing.
    unsafe {
        let begun = deliver.is_some();
        conn.read.get().write(Some(ReadHalf { begun, ..ReadHalf::new(protocol) }));
        conn.write.get().write(Some(WriteHalf { responses: Responses::new(protocol), tls: None }));
    }
    conn.kind.store(Kind::Tracked as u8, Ordering::Release);
    fdtable::set(fd, fdtable::Entry::Connection(index));
    if deliver.is_none() {
        daemon::set_followed(FOLLOWED.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
    }
    Some(())
}

/// Connections in use that this process has accepted from their clients.
pub(crate) fn followed() -> u32 {
    FOLLOWED.load(Ordering::Relaxed)
}

/// The slot table is about to be replaced: what it says for good is remembered.
pub(crate) fn remember_gone() {
    for (index, conn) in all().filter(|(_, c)| c.asked.load(Ordering::Acquire)) {
        if daemon::slot_state(index) == GONE {
            conn.gone.store(true, Ordering::Release);
        }
    }
}

/// A second descriptor for a connection (dup).
pub(crate) fn share(old: i32, new: i32) {
    forget(new);
    let entry = fdtable::get(old);
    if let fdtable::Entry::Connection(index) = entry
        && let Some(conn) = get(index)
    {
        if !fdtable::has_room_for(new) {
            // What is done by that number is seen by nobody.
            return conn.abandon(Reason::Shared);
        }
        conn.descriptors.fetch_add(1, Ordering::Relaxed);
    }
    fdtable::set(new, entry);
}

/// A descriptor is closed, or its number used for something else.
pub(crate) fn forget(fd: i32) {
    if let fdtable::Entry::Connection(index) = fdtable::set(fd, fdtable::Entry::None)
        && let Some(conn) = get(index)
        && conn.descriptors.fetch_sub(1, Ordering::AcqRel) == 1
    {
        conn.release(index);
    }
}

impl Conn {
    /// What is done about it.
    pub(crate) fn kind(&self) -> Kind {
        match self.kind.load(Ordering::Acquire) {
            1 => Kind::Tracked,
            2 => Kind::Passive,
            _ => Kind::Free,
        }
    }

    /// State word of its slot.
    pub(crate) fn slot_state(&self, index: u32) -> u32 {
        if self.gone.load(Ordering::Acquire) { GONE } else { daemon::slot_state(index) }
    }

    /// Leaves the connection alone from now on.
    pub(crate) fn abandon(&self, reason: Reason) {
        let tracked = Kind::Tracked as u8;
        if self
            .kind
            .compare_exchange(tracked, Kind::Passive as u8, Ordering::SeqCst, Ordering::Relaxed)
            .is_ok()
        {
            daemon::count(reason as usize);
        }
    }

    /// Could nobody else read it now?
    pub(crate) fn is_alone(&self) -> bool {
        alone::is_alone(self.forks.load(Ordering::Relaxed))
    }

    /// Does it have a record layer?
    #[inline]
    pub(crate) fn has_layer(&self) -> bool {
        self.has_layer.load(Ordering::Acquire)
    }

    /// Its record layer.
    #[inline]
    pub(crate) fn layer(&self) -> Option<Arc<Layer>> {
        if self.has_layer() { self.layer.lock().clone() } else { None }
    }

    /// Is this its last descriptor?
    pub(crate) fn is_last_descriptor(&self) -> bool {
        self.descriptors.load(Ordering::Acquire) == 1
    }

    /// May it be in another machine's hands, or about to be?
    pub(crate) fn may_be_elsewhere(&self, index: u32) -> bool {
        self.asked.load(Ordering::SeqCst) && matches!(self.slot_state(index), PENDING | GONE)
    }

    /// Claims the reading half.
    pub(crate) fn read(&self) -> Option<Claim<'_, ReadHalf>> {
        Claim::new(&self.reading, &self.read)
    }

    /// Claims the writing half.
    pub(crate) fn write(&self) -> Option<Claim<'_, WriteHalf>> {
        Claim::new(&self.writing, &self.write)
    }

    fn release(&self, index: u32) {
        let delivery = self.delivery.load(Ordering::Relaxed);
        if delivery != NONE {
            daemon::closed_delivery(delivery, self.given_by.load(Ordering::Relaxed));
        } else {
            daemon::set_followed(FOLLOWED.fetch_sub(1, Ordering::Relaxed).wrapping_sub(1));
        }
        // A verdict that is still to come finds the slot cleared and is ignored. In a child that has no channel of its
        // own the slot is the parent's, who may be waiting for it.
        if daemon::is_ours() {
            daemon::clear_slot(index);
        }
        self.kind.store(Kind::Free as u8, Ordering::Release);
        // Its secrets go with the last thread that uses it.
        self.has_layer.store(false, Ordering::Release);
        drop(self.layer.lock().take());
        if let Some(mut half) = self.write() {
            *half = WriteHalf::default();
        }
        if let Some(mut half) = self.read() {
            half.tls = None;
        }
        give_back(index);
    }
}

/// The right to one half of a connection.
pub(crate) struct Claim<'c, T> {
    flag: &'c AtomicBool,
    value: &'c mut T,
}

impl<'c, T> Claim<'c, T> {
    fn new(flag: &'c AtomicBool, cell: &'c UnsafeCell<Option<T>>) -> Option<Claim<'c, T>> {
        if flag.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: the flag was clear and is ours now: nobody else has a reference into the cell.
        match unsafe { &mut *cell.get() } {
            Some(value) => Some(Claim { flag, value }),
            None => {
                flag.store(false, Ordering::Release);
                None
            }
        }
    }
}

impl<T> std::ops::Deref for Claim<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value
    }
}

impl<T> std::ops::DerefMut for Claim<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value
    }
}

impl<T> Drop for Claim<'_, T> {
    fn drop(&mut self) {
        self.flag.store(false, Ordering::Release);
    }
}

fn take() -> Option<u32> {
    let mut head = FREE.load(Ordering::Acquire);
    while let Some(index) = (head as u32).checked_sub(1) {
        let next = get(index)?.next_free.load(Ordering::Relaxed);
        let new = (head >> 32).wrapping_add(1) << 32 | u64::from(next);
        match FREE.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return Some(index),
            Err(now) => head = now,
        }
    }
    USED.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| ((n as usize) < SLOTS).then_some(n + 1)).ok()
}

fn give_back(index: u32) {
    let Some(conn) = get(index) else { return };
    let mut head = FREE.load(Ordering::Acquire);
    loop {
        conn.next_free.store(head as u32, Ordering::Relaxed);
        let new = (head >> 32).wrapping_add(1) << 32 | u64::from(index + 1);
        match FREE.compare_exchange_weak(head, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return,
            Err(now) => head = now,
        }
    }
}
