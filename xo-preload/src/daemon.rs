//! The channel to this machine's `xo-peerd`, one for each process.
//!
//! A child must not use its parent's: a page that the kernel wipes on fork says whose it is.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use once_cell::race::OnceBox;
use xo_proto::board::node_id;
use xo_proto::frame::{MAX_LOCAL_MESSAGE, decode_local, encode_local};
use xo_proto::ipc::{Deliver, FromDaemon, Offload, Ticket, ToDaemon, VERSION};
use xo_proto::reason::Reason;
use xo_proto::slot::{FREE, PENDING, stay};
use xo_sys::board::Board;
use xo_sys::raw::{self, Fd};
use xo_sys::slots::SlotTable;
use xo_sys::{fdpass, tcp_repair};
use zeroize::Zeroize;

use crate::{alone, conn, lifecycle, poll, register};

/// How long the daemon may take to answer a hello or a take; the server waits meanwhile.
const PATIENCE: libc::timeval = libc::timeval { tv_sec: 0, tv_usec: 200_000 };
/// Pause after a failed connection; a shorter one while the daemon may just be restarting.
const PAUSE: Duration = Duration::from_secs(1);
const SHORT_PAUSE: Duration = Duration::from_millis(50);
const RESTART: Duration = Duration::from_secs(5);
/// A blocked caller looks this often whether the daemon is still there.
const LOOK: Duration = Duration::from_millis(100);
/// Our descriptors keep out of the way of the server's low numbers.
const LEAST_FD: RawFd = 400;

static SOCKET: OnceBox<PathBuf> = OnceBox::new();
static NODE: OnceBox<String> = OnceBox::new();
static TICKET: OnceBox<Ticket> = OnceBox::new();
static CHANNEL: AtomicI32 = AtomicI32::new(-1);
static SLOTS: AtomicPtr<SlotTable> = AtomicPtr::new(std::ptr::null_mut());
static BOARD: AtomicPtr<Board> = AtomicPtr::new(std::ptr::null_mut());
/// This machine's number on the board.
static NODE_ID: AtomicU64 = AtomicU64::new(0);
static EPOCH: AtomicU32 = AtomicU32::new(0);
/// See [`set_answers_for_tls`].
static ANSWERS: AtomicBool = AtomicBool::new(false);
static OPENING: AtomicBool = AtomicBool::new(false);
static NOT_BEFORE: AtomicU64 = AtomicU64::new(0);
/// When the daemon went away, ns.
static LOST: AtomicU64 = AtomicU64::new(0);
/// Points into a page that is zero in a child.
static OURS: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

/// Remembers where the daemon is; opens nothing yet.
pub(crate) fn start(socket: PathBuf) -> bool {
    let Ok(page) = raw::map_wiped_on_fork() else { return false };
    OURS.store(page.cast(), Ordering::Release);
    let _ = SOCKET.set(Box::new(socket));
    true
}

/// Where the daemon listens.
pub(crate) fn socket() -> Option<&'static PathBuf> {
    SOCKET.get()
}

/// This machine's node name, once the daemon has told it.
pub(crate) fn node() -> &'static str {
    NODE.get().map_or("", String::as_str)
}

/// This machine's number on the board; 0 while it is not known.
pub(crate) fn node_number() -> u64 {
    NODE_ID.load(Ordering::Relaxed)
}

/// What the daemon makes known to all; that of a daemon which is gone stays in use until there is another.
pub(crate) fn board() -> Option<&'static Board> {
    // SAFETY: boards are leaked, never freed: a thread may be reading one.
    unsafe { BOARD.load(Ordering::Acquire).as_ref() }
}

/// The channel's descriptor, or -1.
pub(crate) fn fd() -> RawFd {
    CHANNEL.load(Ordering::Acquire)
}

/// Is the channel open, and this process's own?
pub(crate) fn is_open() -> bool {
    fd() >= 0 && is_ours()
}

/// The same descriptor under a number that a server does not expect to be free.
pub(crate) fn out_of_the_way(fd: Fd) -> Option<Fd> {
    let low = fd.as_raw_fd();
    raw::duplicate_from(low, LEAST_FD).or_else(|_| raw::duplicate_from(low, 3)).ok()
}

/// The server has moved our descriptor out of its way.
pub(crate) fn replace_fd(fd: RawFd) {
    CHANNEL.store(fd, Ordering::Release);
}

/// Was the channel opened by this process, and not by its parent?
pub(crate) fn is_ours() -> bool {
    // SAFETY: the page is mapped for good.
    unsafe { OURS.load(Ordering::Acquire).as_ref() }.is_some_and(|w| w.load(Ordering::Relaxed) != 0)
}

/// This process. Kept beside the word that says whose the channel is: a child asks the kernel for its own.
pub(crate) fn process() -> u32 {
    // SAFETY: the page is mapped for good, and holds more than one word.
    let Some(word) = (unsafe { OURS.load(Ordering::Acquire).add(1).as_ref() }) else { return raw::process() };
    match word.load(Ordering::Relaxed) {
        0 => {
            let process = raw::process();
            word.store(process, Ordering::Relaxed);
            process
        }
        process => process,
    }
}

/// In a child of fork: learns its own number at once, so that its vforks are told from itself.
pub(crate) extern "C" fn forked() {
    process();
    alone::forked();
}

/// Does this process run in its parent's memory (vfork)? What it does to its descriptors is not done to the parent's.
pub(crate) fn is_borrowed() -> bool {
    process() != raw::process()
}

fn slots() -> Option<&'static SlotTable> {
    // SAFETY: tables are leaked, never freed: a thread may be using one.
    unsafe { SLOTS.load(Ordering::Acquire).as_ref() }
}

/// Opens the channel unless it is open; `false` when there is no daemon.
pub(crate) fn open() -> bool {
    if is_open() {
        return true;
    }
    if OPENING.swap(true, Ordering::Acquire) {
        return false;
    }
    if fd() >= 0 && !is_ours() {
        // Inherited: the parent's end stays the parent's.
        raw::close(CHANNEL.swap(-1, Ordering::AcqRel));
        conn::remember_gone();
        SLOTS.store(std::ptr::null_mut(), Ordering::Release);
        NOT_BEFORE.store(0, Ordering::Relaxed);
        register::forget();
    }
    let due = raw::monotonic().as_nanos() as u64 >= NOT_BEFORE.load(Ordering::Relaxed);
    let opened = due && connect();
    // Only an attempt begins a pause: a busy server asks all the time.
    if due && !opened {
        NOT_BEFORE.store((raw::monotonic() + pause()).as_nanos() as u64, Ordering::Relaxed);
    }
    OPENING.store(false, Ordering::Release);
    if opened {
        register::announce_again();
    }
    opened
}

/// How long to wait before the next attempt.
pub(crate) fn pause() -> Duration {
    let lost = Duration::from_nanos(LOST.load(Ordering::Relaxed));
    if raw::monotonic().saturating_sub(lost) < RESTART { SHORT_PAUSE } else { PAUSE }
}

/// As [`open`], however short ago it failed: a daemon was just started.
pub(crate) fn open_now() -> bool {
    NOT_BEFORE.store(0, Ordering::Relaxed);
    open()
}

fn connect() -> bool {
    let Some(path) = SOCKET.get() else { return false };
    let Ok(low) = fdpass::connect(path) else { return false };
    let Some(fd) = out_of_the_way(low) else { return false };
    for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
        let _ = raw::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, &PATIENCE);
    }
    let ticket = TICKET.get().copied();
    if !send_on(fd.as_raw_fd(), &ToDaemon::Hello { version: VERSION, ticket }, &[], 0) {
        return false;
    }
    match receive_on(fd.as_raw_fd(), 0) {
        Some((FromDaemon::Welcome { version: VERSION, node, ticket }, [Some(memory), Some(board), _])) => {
            let Ok(table) = SlotTable::map(memory.as_raw_fd()) else { return false };
            let Ok(board) = Board::map(board.as_raw_fd()) else { return false };
            NODE_ID.store(node_id(&node), Ordering::Relaxed);
            let _ = NODE.set(Box::new(node));
            let _ = TICKET.set(Box::new(ticket));
            BOARD.store(Box::into_raw(Box::new(board)), Ordering::Release);
            table.set_followed(conn::followed());
            table.set_answers_for_tls(ANSWERS.load(Ordering::Relaxed));
            conn::remember_gone();
            let old = slots();
            SLOTS.store(Box::into_raw(Box::new(table)), Ordering::Release);
            EPOCH.fetch_add(1, Ordering::Relaxed);
            if let Some(old) = old {
                recover(old, fd.as_raw_fd());
            }
            // SAFETY: the page is mapped for good.
            if let Some(ours) = unsafe { OURS.load(Ordering::Acquire).as_ref() } {
                ours.store(1, Ordering::Relaxed);
            }
            CHANNEL.store(fd.into_raw(), Ordering::Release);
            log::info!("connected to xo-peerd at {}", path.display());
            true
        }
        Some((FromDaemon::Denied { detail }, _)) => {
            log::error!("xo-peerd at {}: {detail}", path.display());
            false
        }
        _ => false,
    }
}

/// A new daemon: verdicts of the old one are kept; connections that it left in the middle of a hand-off, and which
/// only a daemon can bring back to life, are shown to the new one.
fn recover(old: &SlotTable, channel: RawFd) {
    let Some(new) = slots() else { return };
    for (index, conn) in conn::waiting() {
        match old.state(index) {
            PENDING => {
                let generation = new.begin(index);
                let message = ToDaemon::Recover { slot: index, generation };
                if !send_on(channel, &message, &[conn.fd.load(Ordering::Relaxed)], 0) {
                    log::error!("a connection in the middle of a hand-off is lost");
                }
            }
            state => new.set(index, state),
        }
    }
}

/// Has the daemon not hung up?
pub(crate) fn is_answering() -> bool {
    let fd = fd();
    fd >= 0 && !raw::is_hung_up(fd)
}

/// Is the daemon still there? If not, see [`lost`].
pub(crate) fn check() {
    let fd = fd();
    if fd >= 0 && is_ours() && raw::is_hung_up(fd) {
        lost();
    }
}

/// The daemon is gone: connections that wait for its verdict stay here, but for those that it has put into repair
/// mode; these wait for the next daemon.
pub(crate) fn lost() {
    let fd = CHANNEL.swap(-1, Ordering::AcqRel);
    if fd < 0 {
        return;
    }
    raw::close(fd);
    log::warn!("xo-peerd is gone");
    LOST.store(raw::monotonic().as_nanos() as u64, Ordering::Relaxed);
    NOT_BEFORE.store(0, Ordering::Relaxed);
    poll::look_for_daemon();
    let Some(slots) = slots() else { return };
    for (index, conn) in conn::waiting() {
        let fd = conn.fd.load(Ordering::Relaxed);
        if slots.state(index) == PENDING && !tcp_repair::in_repair(fd) {
            slots.set(index, stay(Reason::NoDaemon));
            let _ = tcp_repair::poke(fd);
        }
    }
}

/// Asks for a hand-off; the verdict comes in the slot. A reason when it could not be asked, or when the connection
/// is not `still` what it was now that the slot is pending; what that gives is for the request.
pub(crate) fn offload<T>(
    fd: RawFd,
    slot: u32,
    still: impl FnOnce() -> Result<T, Reason>,
    request: impl FnOnce(u32, T) -> Offload,
) -> Result<(), Reason> {
    if !open() {
        return Err(Reason::NoDaemon);
    }
    let Some(slots) = slots() else { return Err(Reason::NoDaemon) };
    let generation = slots.begin(slot);
    fence(Ordering::SeqCst);
    let given = still().inspect_err(|_| slots.clear(slot))?;
    let message = ToDaemon::Offload(request(generation, given));
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    let Ok(n) = encode_local(&message, &mut buffer) else {
        slots.clear(slot);
        return Err(Reason::NoTarget);
    };
    let bytes = buffer.get_mut(..n).unwrap_or_default();
    let sent = fdpass::send(self::fd(), bytes, &[fd], libc::MSG_DONTWAIT);
    if message.has_secrets() {
        bytes.zeroize();
    }
    match sent {
        Ok(()) => {
            poll::look_after_daemon();
            Ok(())
        }
        Err(e) => {
            slots.clear(slot);
            if e.kind() == ErrorKind::WouldBlock {
                return Err(Reason::DaemonBusy);
            }
            lost();
            Err(Reason::NoDaemon)
        }
    }
}

/// State word of a slot.
pub(crate) fn slot_state(slot: u32) -> u32 {
    slots().map_or(FREE, |s| s.state(slot))
}

/// Waits for a slot's verdict.
pub(crate) fn wait_slot(slot: u32, timeout: Duration) -> u32 {
    let end = raw::monotonic() + timeout;
    loop {
        // A restarted daemon brings a new table.
        let Some(slots) = slots() else { return FREE };
        let state = slots.wait(slot, LOOK);
        if state != PENDING || raw::monotonic() >= end {
            return state;
        }
        // A child waits for what its parent has asked in the parent's table, and would lose it with a channel of its own.
        if is_ours() {
            check();
            open();
        }
    }
}

/// Gives a slot back.
pub(crate) fn clear_slot(slot: u32) {
    if let Some(slots) = slots() {
        slots.clear(slot);
    }
}

/// Tells the daemon how many connections this process follows that it has accepted from their clients.
pub(crate) fn set_followed(n: u32) {
    if let Some(slots) = slots() {
        slots.set_followed(n);
    }
}

/// Tells the daemon whether this process can go on with a connection that comes with its TLS although its server begins with a
/// handshake.
pub(crate) fn set_answers_for_tls(can: bool) {
    if ANSWERS.swap(can, Ordering::AcqRel) != can
        && let Some(slots) = slots()
    {
        slots.set_answers_for_tls(can);
    }
}

/// Adds one to a counter.
pub(crate) fn count(counter: usize) {
    if let Some(slots) = slots() {
        slots.count(counter);
    }
}

/// Adds `n` to a counter.
pub(crate) fn count_many(counter: usize, n: u32) {
    if let Some(slots) = slots().filter(|_| n > 0) {
        slots.add(counter, n.into());
    }
}

/// Which daemon this process is connected to, counted from 1.
pub(crate) fn epoch() -> u32 {
    EPOCH.load(Ordering::Relaxed)
}

/// Reports that this process has closed a restored connection that the daemon of that epoch had given it.
pub(crate) fn closed_delivery(delivery: u32, given_by: u32) {
    if let Some(slots) = slots().filter(|_| is_ours() && epoch() == given_by) {
        slots.close_delivery(delivery);
    }
}

/// Is this the source port of a wake-up connection?
pub(crate) fn is_wake_port(port: u16) -> bool {
    is_ours() && slots().is_some_and(|s| s.has_wake_port(port))
}

/// Tells the daemon that this process accepts from a listening socket; see [`ToDaemon::Register`].
pub(crate) fn register(descriptors: &[RawFd], epoll: bool) -> bool {
    if !is_open() {
        return false;
    }
    let tls = !lifecycle::has_ring();
    let sent = send_on(fd(), &ToDaemon::Register { epoll, tls }, descriptors, 0);
    if !sent {
        check();
    }
    sent
}

/// What a registration's channel gives.
#[expect(clippy::large_enum_variant, reason = "it lives on the stack for the time of an accept")]
pub(crate) enum Delivery {
    /// A restored connection.
    One(Deliver, Fd),
    /// None waits.
    Nothing,
    /// One waits, and there is no descriptor for it: this errno, as of accept.
    NoRoom(i32),
    /// None will come any more.
    End,
}

/// Looks for a restored connection on a registration's channel.
pub(crate) fn receive_delivery(channel: RawFd) -> Delivery {
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    match raw::peek(channel, buffer.get_mut(..1).unwrap_or_default(), libc::MSG_DONTWAIT) {
        Ok(0) => return Delivery::End,
        // The kernel would drop a connection for which there is no descriptor.
        Ok(_) => match raw::duplicate_low(channel, true) {
            Ok(_) => {}
            Err(e) => return Delivery::NoRoom(e.raw_os_error().unwrap_or(libc::EMFILE)),
        },
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Delivery::Nothing,
        Err(_) => return Delivery::End,
    }
    match fdpass::recv(channel, &mut buffer, libc::MSG_DONTWAIT) {
        Ok((0, _)) => Delivery::End,
        Ok((n, [fd, ..])) => match (decoded(&mut buffer, n), fd) {
            (Some(FromDaemon::Deliver(deliver)), Some(fd)) => Delivery::One(deliver, fd),
            _ => Delivery::Nothing,
        },
        Err(e) if e.kind() == ErrorKind::WouldBlock => Delivery::Nothing,
        Err(_) => Delivery::End,
    }
}

/// The message in the first `n` bytes, which are overwritten if it has secrets.
fn decoded(buffer: &mut [u8], n: usize) -> Option<FromDaemon> {
    let bytes = buffer.get_mut(..n).unwrap_or_default();
    let message: FromDaemon = decode_local(bytes).ok()?;
    if message.has_secrets() {
        bytes.zeroize();
    }
    Some(message)
}

/// Asks for the restored connection that a wake-up stands for.
pub(crate) fn take(wake_port: u16) -> Option<(Deliver, Fd)> {
    if !open() || !send_on(fd(), &ToDaemon::Take { wake_port }, &[], 0) {
        return None;
    }
    match receive_on(fd(), 0)? {
        (FromDaemon::Deliver(deliver), [Some(fd), ..]) => Some((deliver, fd)),
        _ => None,
    }
}

fn send_on(fd: RawFd, message: &ToDaemon, passed: &[RawFd], flags: i32) -> bool {
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    let Ok(n) = encode_local(message, &mut buffer) else { return false };
    fdpass::send(fd, buffer.get(..n).unwrap_or_default(), passed, flags).is_ok()
}

fn receive_on(fd: RawFd, flags: i32) -> Option<(FromDaemon, fdpass::Received)> {
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    match fdpass::recv(fd, &mut buffer, flags) {
        Ok((0, _)) => {
            lost();
            None
        }
        Ok((n, passed)) => Some((decoded(&mut buffer, n)?, passed)),
        Err(_) => None,
    }
}
