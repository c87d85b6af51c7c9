//! The board: memory that the daemon writes and libraries can only read. The meaning of the words stands in
//! `xo_proto::board`.

use std::io;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use memfd::{FileSeal, MemfdOptions};
use xo_proto::board::{AVOIDED, HOMES, MAGIC, MAX_POLICY, ROWS, UP, place};

use crate::raw;

#[repr(C)]
struct Row {
    /// 0 for a free row.
    id: AtomicU64,
    state: AtomicU32,
    connections: AtomicU32,
    cpu_permille: AtomicU32,
    /// Goes up with each report of the machine.
    reports: AtomicU32,
}

#[repr(C)]
struct Home {
    /// 0 for a free one.
    id: AtomicU64,
    /// Machines that its connections are to leave; 0 for none.
    avoided: [AtomicU64; AVOIDED],
}

/// Layout of the memory. Every word is an atomic: it is written while it is read.
#[repr(C)]
struct Layout {
    magic: AtomicU32,
    size: AtomicU32,
    /// Twice the policy's epoch; odd while it is being written.
    version: AtomicU32,
    /// Bytes of the policy.
    length: AtomicU32,
    rows: [Row; ROWS],
    homes: [Home; HOMES],
    policy: [AtomicU64; MAX_POLICY / 8],
}

const SIZE: usize = size_of::<Layout>();
const _: () = assert!(offset_of!(Layout, rows).is_multiple_of(8) && SIZE < u32::MAX as usize);

/// What a machine has last said of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Connections that it serves.
    pub connections: u32,
    /// How busy its processors are.
    pub cpu_permille: u32,
    /// Distinguishes a report from the one before.
    pub reports: u32,
}

/// A board as libraries see it: mapped without the right to write.
pub struct Board {
    layout: NonNull<Layout>,
}

// SAFETY: the memory consists of atomics only.
unsafe impl Send for Board {}
// SAFETY: as above.
unsafe impl Sync for Board {}

impl Board {
    /// Maps a board that the daemon has sent.
    ///
    /// # Errors
    /// Of lseek and mmap; `InvalidData` when it is no board of this version.
    pub fn map(fd: RawFd) -> io::Result<Board> {
        if raw::file_size(fd)? != SIZE as u64 {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let board = Self::of(raw::map_shared_readonly(fd, SIZE)?)?;
        let layout = board.get();
        if layout.magic.load(Ordering::Acquire) != MAGIC || layout.size.load(Ordering::Relaxed) != SIZE as u32
        {
            return Err(io::ErrorKind::InvalidData.into());
        }
        Ok(board)
    }

    fn of(address: *mut u8) -> io::Result<Board> {
        let layout = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Board { layout })
    }

    fn get(&self) -> &Layout {
        // SAFETY: mapped, `SIZE` bytes, for as long as `self` lives; atomics allow shared writes.
        unsafe { self.layout.as_ref() }
    }

    /// The row of a machine or handler.
    #[must_use]
    pub fn row(&self, id: u64) -> Option<usize> {
        let rows = &self.get().rows;
        probe(id, ROWS).map_while(|i| rows.get(i).map(|r| (i, r.id.load(Ordering::Acquire)))).find_map(
            |(i, taken)| match taken {
                0 => Some(None),
                taken => (taken == id).then_some(Some(i)),
            },
        )?
    }

    /// The state of a machine or handler; [`UP`] for one without a row.
    #[must_use]
    pub fn state(&self, id: u64) -> u32 {
        let row = self.row(id).and_then(|i| self.get().rows.get(i));
        row.map_or(UP, |r| r.state.load(Ordering::Relaxed))
    }

    /// What the machine of this row has said of itself.
    #[must_use]
    pub fn load(&self, row: usize) -> Load {
        let Some(row) = self.get().rows.get(row) else { return Load::default() };
        Load {
            connections: row.connections.load(Ordering::Relaxed),
            cpu_permille: row.cpu_permille.load(Ordering::Relaxed),
            reports: row.reports.load(Ordering::Relaxed),
        }
    }

    /// Does this home want its connections to leave that machine?
    #[must_use]
    pub fn avoids(&self, home: u64, machine: u64) -> bool {
        self.home(home).is_some_and(|h| h.avoided.iter().any(|a| a.load(Ordering::Relaxed) == machine))
    }

    fn home(&self, id: u64) -> Option<&Home> {
        let homes = &self.get().homes;
        let known =
            probe(id, HOMES).map_while(|i| homes.get(i)).take_while(|h| h.id.load(Ordering::Acquire) != 0);
        known.into_iter().find(|h| h.id.load(Ordering::Relaxed) == id)
    }

    /// Goes up with each new policy; 0: the daemon has none.
    #[must_use]
    pub fn policy_epoch(&self) -> u32 {
        self.get().version.load(Ordering::Acquire) / 2
    }

    /// The policy's text and its epoch. `None`: there is none, or it is just being replaced.
    #[must_use]
    pub fn policy(&self) -> Option<(u32, String)> {
        let layout = self.get();
        let version = layout.version.load(Ordering::Acquire);
        if version == 0 || !version.is_multiple_of(2) {
            return None;
        }
        let length = (layout.length.load(Ordering::Relaxed) as usize).min(MAX_POLICY);
        let mut bytes = Vec::with_capacity(length.next_multiple_of(8));
        for word in layout.policy.iter().take(length.div_ceil(8)) {
            bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
        }
        fence(Ordering::Acquire);
        if layout.version.load(Ordering::Relaxed) != version {
            return None;
        }
        bytes.truncate(length);
        String::from_utf8(bytes).ok().map(|text| (version / 2, text))
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        raw::unmap(self.layout.as_ptr().cast(), SIZE);
    }
}

/// Places where a number may be, in order.
fn probe(id: u64, places: usize) -> impl Iterator<Item = usize> {
    let begin = place(id, places);
    (0..places).map(move |i| (begin + i) % places)
}

/// The daemon's side of the board.
pub struct Keeper {
    board: Board,
}

impl Keeper {
    /// Makes a board; the descriptor is for the processes that are to read it. It is sealed: nobody else can write to it,
    /// or make who reads it fault.
    ///
    /// # Errors
    /// Of memfd_create, ftruncate, mmap and fcntl (Linux 5.1 is needed).
    pub fn create() -> io::Result<(Keeper, OwnedFd)> {
        let other = |e: memfd::Error| io::Error::other(e.to_string());
        let memory = MemfdOptions::default().allow_sealing(true).create("xo-board").map_err(other)?;
        memory.as_file().set_len(SIZE as u64)?;
        // This mapping is older than the seal and stays writable.
        let board = Board::of(raw::map_shared(memory.as_raw_fd(), SIZE)?)?;
        let seals = [FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealFutureWrite, FileSeal::SealSeal];
        memory.add_seals(&seals).map_err(other)?;
        board.get().size.store(SIZE as u32, Ordering::Relaxed);
        board.get().magic.store(MAGIC, Ordering::Release);
        Ok((Keeper { board }, memory.into_file().into()))
    }

    /// The board, to read.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The row of a machine or handler, a new one if it has none; `None` when all are taken.
    fn take_row(&self, id: u64) -> Option<&Row> {
        let rows = &self.board.get().rows;
        let index = probe(id, ROWS).find(|i| {
            rows.get(*i)
                .is_some_and(|r| matches!(r.id.load(Ordering::Relaxed), taken if taken == id || taken == 0))
        })?;
        let row = rows.get(index)?;
        row.id.store(id, Ordering::Release);
        Some(row)
    }

    /// Sets a state; one that speaks for nothing takes no row.
    pub fn set_state(&self, id: u64, state: u32) {
        if state == UP && self.board.row(id).is_none() {
            return;
        }
        if let Some(row) = self.take_row(id) {
            row.state.store(state, Ordering::Relaxed);
        }
    }

    /// Sets what a machine says of itself.
    pub fn set_load(&self, id: u64, connections: u32, cpu_permille: u32) {
        if let Some(row) = self.take_row(id) {
            row.connections.store(connections, Ordering::Relaxed);
            row.cpu_permille.store(cpu_permille, Ordering::Relaxed);
            row.reports.fetch_add(1, Ordering::Release);
        }
    }

    /// A connection leaves a machine; its next report says how many are left.
    pub fn one_leaves(&self, id: u64) {
        if let Some(row) = self.board.row(id).and_then(|i| self.board.get().rows.get(i)) {
            let less = row.connections.load(Ordering::Relaxed).saturating_sub(1);
            row.connections.store(less, Ordering::Relaxed);
        }
    }

    /// Sets the machines that a home's connections are to leave, at most [`AVOIDED`].
    pub fn set_avoided(&self, home: u64, machines: &[u64]) {
        let homes = &self.board.get().homes;
        let free = |h: &&Home| matches!(h.id.load(Ordering::Relaxed), taken if taken == home || taken == 0);
        let Some(found) = probe(home, HOMES).filter_map(|i| homes.get(i)).find(free) else { return };
        for (i, word) in found.avoided.iter().enumerate() {
            word.store(machines.get(i).copied().unwrap_or_default(), Ordering::Relaxed);
        }
        found.id.store(home, Ordering::Release);
    }

    /// Sets the policy and gives it a new epoch. `false`: it is too long.
    pub fn set_policy(&self, text: &str) -> bool {
        let layout = self.board.get();
        if text.len() > MAX_POLICY {
            return false;
        }
        let version = layout.version.load(Ordering::Relaxed);
        layout.version.store(version | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        layout.length.store(text.len() as u32, Ordering::Relaxed);
        for (word, bytes) in layout.policy.iter().zip(text.as_bytes().chunks(8)) {
            let mut whole = [0; 8];
            whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            word.store(u64::from_le_bytes(whole), Ordering::Relaxed);
        }
        layout.version.store((version | 1) + 1, Ordering::Release);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xo_proto::board::{DOWN, node_id};

    fn pair() -> (Keeper, Board, OwnedFd) {
        let (keeper, fd) = Keeper::create().expect("a board");
        let board = Board::map(fd.as_raw_fd()).expect("the same board");
        (keeper, board, fd)
    }

    #[test]
    fn what_the_daemon_writes_libraries_read() {
        let (keeper, board, _fd) = pair();
        let (t1, t2, home) = (node_id("t1"), node_id("t2"), node_id("host"));
        assert_eq!((board.state(t1), board.row(t1)), (UP, None));
        keeper.set_state(t1, UP);
        assert_eq!(board.row(t1), None, "nothing is known");
        keeper.set_load(t1, 7, 250);
        keeper.set_state(t2, DOWN);
        let row = board.row(t1).expect("a row");
        assert_eq!(board.load(row), Load { connections: 7, cpu_permille: 250, reports: 1 });
        keeper.one_leaves(t1);
        assert_eq!(board.load(row), Load { connections: 6, cpu_permille: 250, reports: 1 });
        assert_eq!((board.state(t1), board.state(t2)), (UP, DOWN));
        keeper.set_state(t2, UP);
        assert_eq!(board.state(t2), UP);
        keeper.set_avoided(home, &[t1]);
        assert!(board.avoids(home, t1) && !board.avoids(home, t2) && !board.avoids(t1, t1));
        keeper.set_avoided(home, &[]);
        assert!(!board.avoids(home, t1));
    }

    #[test]
    fn a_full_board_goes_on_as_it_is() {
        let (keeper, board, _fd) = pair();
        for id in 1..=ROWS as u64 {
            keeper.set_state(id << 32 | 5, DOWN);
        }
        assert_eq!(board.state(1 << 32 | 5), DOWN);
        keeper.set_load(node_id("late"), 1, 1);
        assert_eq!((board.row(node_id("late")), board.state(node_id("late"))), (None, UP));
        for home in 1..=HOMES as u64 + 1 {
            keeper.set_avoided(home, &[9]);
        }
        assert!(board.avoids(HOMES as u64, 9) && !board.avoids(HOMES as u64 + 1, 9));
    }

    #[test]
    fn policies_are_read_whole() {
        let (keeper, board, _fd) = pair();
        assert_eq!((board.policy_epoch(), board.policy()), (0, None));
        assert!(!keeper.set_policy(&"x".repeat(MAX_POLICY + 1)));
        assert!(keeper.set_policy("") && board.policy() == Some((1, String::new())));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                for i in 0..2000_usize {
                    keeper
                        .set_policy(&char::from(b'a' + (i % 26) as u8).to_string().repeat(1 + i * 7 % 4096));
                }
                done.store(true, Ordering::Release);
            });
            let mut read = 0;
            while !done.load(Ordering::Acquire) || read == 0 {
                let Some((_, text)) = board.policy() else { continue };
                read += 1;
                let first = text.chars().next();
                assert!(text.chars().all(|c| Some(c) == first), "two policies in one");
            }
        });
        assert_eq!(board.policy_epoch(), 2001);
    }

    #[test]
    fn nobody_else_can_write() {
        let (_keeper, _board, fd) = pair();
        assert!(raw::map_shared(fd.as_raw_fd(), SIZE).is_err(), "mapped writable");
        assert!(std::fs::File::from(fd).set_len(1).is_err(), "cut short");
        let file = std::fs::File::open("/proc/self/exe").expect("our binary");
        assert!(Board::map(file.as_raw_fd()).is_err(), "another file");
    }
}
