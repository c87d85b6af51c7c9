//! The Unix socket: libraries in servers' processes, and `xo-peerd status`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::rc::Rc;

use mio::unix::SourceFd;
use serde_json::json;
use xo_proto::frame::{MAX_LOCAL_MESSAGE, decode_local, encode_local};
use xo_proto::ipc::{FromDaemon, Query, ToDaemon, VERSION};
use xo_proto::slot;
use xo_sys::fdpass;
use xo_sys::slots::SlotTable;
use zeroize::Zeroize;

use crate::acceptor::Channel;
use crate::engine::Engine;

/// Longest packet of an answer to a query, bytes.
const QUERY_PACKET: usize = 32 << 10;

/// A process under the library, or an operator's command.
pub(crate) struct Library {
    socket: OwnedFd,
    /// Process and user on the other end, as the kernel vouches for them.
    pub(crate) pid: u32,
    uid: u32,
    /// Distinguishes processes that had the same index one after the other.
    pub(crate) serial: u64,
    /// Its slot table, once it has said hello.
    pub(crate) slots: Option<Rc<SlotTable>>,
    /// Deliveries not in use.
    free: Vec<u32>,
    /// Deliveries handed out at least once.
    fresh: u32,
}

impl Library {
    /// Takes over an accepted connection.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Library> {
        let who = fdpass::peer_credentials(socket.as_raw_fd())?;
        Ok(Library { socket, pid: who.pid, uid: who.uid, serial: 0, slots: None, free: Vec::new(), fresh: 0 })
    }

    /// For registration with the poller.
    pub(crate) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// A delivery's index, if the process can hold one more.
    pub(crate) fn take_delivery(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let next = self.fresh;
            (next < slot::DELIVERIES as u32).then(|| {
                self.fresh += 1;
                next
            })
        })
    }

    /// The delivery's connection has ended.
    pub(crate) fn free_delivery(&mut self, delivery: u32) {
        if let Some(slots) = &self.slots {
            slots.free_delivery(delivery);
        }
        self.free.push(delivery);
    }

    /// Sends one message.
    pub(crate) fn send(&self, message: &FromDaemon, fds: &[RawFd]) -> io::Result<()> {
        send(self.fd(), message, fds)
    }
}

/// Sends one message to a library, if there is room.
pub(crate) fn send(socket: RawFd, message: &FromDaemon, fds: &[RawFd]) -> io::Result<()> {
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    let n = encode_local(message, &mut buffer).map_err(|e| io::Error::new(ErrorKind::InvalidInput, e))?;
    let result = fdpass::send(socket, &buffer[..n], fds, libc::MSG_DONTWAIT);
    if message.has_secrets() {
        buffer[..n].zeroize();
    }
    result
}

impl Engine {
    /// A library's socket has something for us.
    pub(crate) fn library_ready(&mut self, index: usize) {
        loop {
            let Some(library) = self.libraries.get(index) else { return };
            let mut buffer = [0; MAX_LOCAL_MESSAGE];
            match fdpass::recv(library.fd(), &mut buffer, libc::MSG_DONTWAIT) {
                Ok((0, _)) => return self.library_gone(index, "gone"),
                Ok((n, fds)) => {
                    let fds = fds.map(|fd| fd.map(OwnedFd::from));
                    let decoded = decode_local::<ToDaemon>(&buffer[..n]);
                    if decoded.as_ref().is_ok_and(ToDaemon::has_secrets) {
                        buffer[..n].zeroize();
                    }
                    let result = match decoded {
                        Ok(message) => self.on_library_message(index, message, fds),
                        Err(e) => Err(e.to_string()),
                    };
                    if let Err(why) = result {
                        return self.library_gone(index, &why);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => return self.library_gone(index, &e.to_string()),
            }
        }
    }

    fn on_library_message(
        &mut self,
        index: usize,
        message: ToDaemon,
        fds: [Option<OwnedFd>; fdpass::MAX_FDS],
    ) -> Result<(), String> {
        let greeted = self.libraries.get(index).is_some_and(|l| l.slots.is_some());
        match (message, fds) {
            (ToDaemon::Hello { version, ticket }, [None, ..]) if !greeted => {
                self.greet(index, version, ticket)
            }
            (ToDaemon::Query(query), [None, ..]) => self.answer(index, query),
            (ToDaemon::Offload(offload), [Some(fd), None, None]) if greeted => {
                self.on_offload(index, offload, fd);
                Ok(())
            }
            (ToDaemon::Recover { slot, generation }, [Some(fd), None, None]) if greeted => {
                self.on_recover(index, slot, generation, fd);
                Ok(())
            }
            (ToDaemon::Register { epoll: true, tls }, [Some(listener), Some(ours), Some(theirs)])
                if greeted =>
            {
                self.register(index, &listener, Some(Channel::new(ours, theirs)), tls)
            }
            (ToDaemon::Register { epoll: false, tls }, [Some(listener), None, None]) if greeted => {
                self.register(index, &listener, None, tls)
            }
            (ToDaemon::Take { wake_port }, [None, ..]) if greeted => self.take(index, wake_port),
            (message, _) => Err(format!("unexpected message {message:?}")),
        }
    }

    fn greet(&mut self, index: usize, version: u16, ticket: Option<[u8; 16]>) -> Result<(), String> {
        let trusted = self.trusts(index, ticket);
        let serial = self.next_serial();
        let Some(library) = self.libraries.get_mut(index) else { return Ok(()) };
        let refusal = if version != VERSION {
            Some(format!("the library speaks version {version}, the daemon {VERSION}"))
        } else if !trusted {
            Some(format!("user {} is not in `users` of the daemon's configuration", library.uid))
        } else {
            None
        };
        if let Some(detail) = refusal {
            let _ = library.send(&FromDaemon::Denied { detail: detail.clone() }, &[]);
            return Err(detail);
        }
        let (slots, memory) = SlotTable::create().map_err(|e| format!("slot table: {e}"))?;
        let welcome = FromDaemon::Welcome {
            version: VERSION,
            node: self.config.node.clone(),
            ticket: self.state.ticket(),
        };
        let board = self.targets.memory().as_raw_fd();
        library.send(&welcome, &[memory.as_raw_fd(), board]).map_err(|e| e.to_string())?;
        library.slots = Some(Rc::new(slots));
        library.serial = serial;
        log::debug!("process {} of user {}: welcome", library.pid, library.uid);
        Ok(())
    }

    /// Root, our own user, a configured user, or a descendant of a process that was one of these.
    fn trusts(&self, index: usize, ticket: Option<[u8; 16]>) -> bool {
        self.libraries
            .get(index)
            .is_some_and(|l| self.trusts_user(l.uid) || ticket == Some(self.state.ticket()))
    }

    /// Root, our own user, or a configured one.
    pub(crate) fn trusts_user(&self, user: u32) -> bool {
        // SAFETY: no arguments, cannot fail.
        let own = unsafe { libc::geteuid() };
        user == 0 || user == own || self.config.users.contains(&user)
    }

    fn answer(&mut self, index: usize, query: Query) -> Result<(), String> {
        if !self.trusts(index, None) {
            return Err("a query from a user who is not in `users`".into());
        }
        let text = match query {
            Query::Status => self.metrics.status_json(&self.live()),
            Query::Flows => self.flows_json(),
            Query::Drain { node, on } => match self.set_draining(&node, on) {
                Ok(()) => json!({"draining": self.state.draining()}).to_string(),
                Err(error) => json!({"error": error}).to_string(),
            },
            Query::Reload => self.reload_answer().to_string(),
        };
        let Some(library) = self.libraries.get(index) else { return Ok(()) };
        // The asker reads as fast as we write; its socket is made blocking for these few packets.
        for packet in text.as_bytes().chunks(QUERY_PACKET) {
            fdpass::send(library.fd(), packet, &[], 0).map_err(|e| e.to_string())?;
        }
        Err("answered".into())
    }

    fn library_gone(&mut self, index: usize, why: &str) {
        let Some(library) = self.libraries.try_remove(index) else { return };
        let _ = self.poll.registry().deregister(&mut SourceFd(&library.fd()));
        if why == "gone" || why == "answered" {
            log::debug!("process {}: {why}", library.pid);
        } else {
            log::warn!("process {} of user {}: {why}", library.pid, library.uid);
        }
        if let Some(slots) = &library.slots {
            for (i, past) in self.past_counters.iter_mut().enumerate() {
                *past += slots.counter(i);
            }
        }
        self.forget_process(index, library.serial);
    }
}
