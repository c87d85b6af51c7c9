//! One relayed connection: a socket with records, a socket pair with plain bytes, and the record layer between them.
//!
//! Each direction reads only when what it has read before is gone, so at most a portion waits here, and who is slow slows down who
//! writes to him, as on a connection of its own. Readiness is told by edges: a flag says that there may be something, until a call
//! says that there is not.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use mio::event::Event;
use xo_proto::tls::{End, Session};
use xo_sys::raw;
use zeroize::Zeroize;

/// How long a client may take to make room for what its handler has written, once that has ended.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client may take to close when it has been told that all is over. What it still sends would be answered by a reset, which
/// may cost it what it has not read.
const LINGER: Duration = Duration::from_secs(5);
/// How long a client that has said good-bye first, and has been answered, may take to close: who closes first keeps the connection's
/// end for a minute (TIME-WAIT), and here its rules with it.
const COURTESY: Duration = Duration::from_secs(1);
/// Steps before others have their turn.
const STEPS: usize = 32;

/// What has become of a handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Word {
    /// It has done with the connection, in good order: its client is told so.
    Done,
    /// It has ended otherwise: its client must see that something may be missing.
    Cut,
}

/// What a turn has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// There may be more to do at once.
    Again,
    /// Nothing to do until something happens.
    Wait,
    /// The connection has ended.
    Over,
}

/// The handler's direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writing {
    /// It may write.
    Open,
    /// It has closed its end. How that is meant, the engine knows.
    Hung,
    /// All it wrote is sealed; `goodbye` is to be said, if it is one, and then the end.
    Ended { goodbye: bool },
    /// Nothing will follow; the client, which wants it so, may close first.
    Answered,
    /// The socket is shut down for sending.
    Shut,
}

/// Which of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// The client's.
    Client,
    /// The handler's.
    Handler,
}

#[derive(Clone, Copy, Debug)]
struct Ready {
    read: bool,
    write: bool,
}

impl Ready {
    const BOTH: Ready = Ready { read: true, write: true };
}

/// See the module.
pub(super) struct Pipe {
    socket: TcpStream,
    /// Our end of the pair; none when the handler is of no use any more.
    handler: Option<UnixStream>,
    session: Box<Session>,
    client: SocketAddr,
    client_ready: Ready,
    handler_ready: Ready,
    /// The client's socket has ended, or failed.
    client_ended: bool,
    failed: bool,
    /// The handler has been told that nothing more comes.
    told: bool,
    /// The handler does not take anything any more.
    deaf: bool,
    writing: Writing,
    word: Option<Word>,
    deadline: Option<Instant>,
    /// When it will be looked at.
    armed: Option<Instant>,
    /// Not acknowledged by the client when the deadline was set, bytes.
    outstanding: usize,
}

impl Pipe {
    /// Of a connection that is not live yet; `handler` is our end of the pair.
    pub(super) fn new(
        socket: OwnedFd,
        handler: UnixStream,
        session: Box<Session>,
        client: SocketAddr,
    ) -> io::Result<Pipe> {
        let socket = TcpStream::from(socket);
        socket.set_nonblocking(true)?;
        handler.set_nonblocking(true)?;
        Ok(Pipe {
            socket,
            handler: Some(handler),
            session,
            client,
            client_ready: Ready::BOTH,
            handler_ready: Ready::BOTH,
            client_ended: false,
            failed: false,
            told: false,
            deaf: false,
            writing: Writing::Open,
            word: None,
            deadline: None,
            armed: None,
            outstanding: 0,
        })
    }

    /// It is live. A record is all there is to send; a handler cannot set this itself.
    pub(super) fn begin(&self) {
        if let Err(e) = self.socket.set_nodelay(true) {
            log::debug!("TCP_NODELAY for {}: {e}", self.client);
        }
    }

    /// The descriptors: the client's, the handler's.
    pub(super) fn descriptors(&self) -> (RawFd, Option<RawFd>) {
        (self.socket.as_raw_fd(), self.handler.as_ref().map(AsRawFd::as_raw_fd))
    }

    /// Something has happened.
    pub(super) fn happened(&mut self, side: Side, event: &Event) {
        // Nobody would notice while a slow handler keeps us from reading.
        let failed = |s: &TcpStream| s.take_error().map_or(true, |e| e.is_some());
        self.failed |= side == Side::Client && event.is_error() && failed(&self.socket);
        let (read, write) =
            (event.is_readable() || event.is_read_closed(), event.is_writable() || event.is_write_closed());
        self.may(side, read || event.is_error(), write || event.is_error());
    }

    fn may(&mut self, side: Side, read: bool, write: bool) {
        let ready = match side {
            Side::Client => &mut self.client_ready,
            Side::Handler => &mut self.handler_ready,
        };
        ready.read |= read;
        ready.write |= write;
    }

    /// The engine says what has become of the handler.
    pub(super) fn hear(&mut self, word: Word) {
        self.word.get_or_insert(word);
        // Others may have its end still: they are not waited for.
        self.deaf = true;
        self.may(Side::Handler, true, true);
        self.wait_until_gone();
    }

    /// The engine is to say what has become of the handler.
    pub(super) fn asks(&self) -> bool {
        self.writing == Writing::Hung && self.word.is_none()
    }

    /// When it is to be looked at whatever happens, if it is not going to be by then.
    pub(super) fn arm(&mut self) -> Option<Instant> {
        let when = self.deadline.filter(|d| self.armed.is_none_or(|armed| *d < armed))?;
        self.armed = Some(when);
        self.armed
    }

    /// Moves what can be moved; `buffer` is for anybody's bytes.
    pub(super) fn turn(&mut self, buffer: &mut [u8]) -> Turn {
        for _ in 0..STEPS {
            if self.failed {
                return Turn::Over;
            }
            let moved = self.carry_in(buffer).and_then(|a| Ok(a | self.carry_out(buffer)?));
            match moved {
                Ok(true) => {}
                Ok(false) if self.is_over() => return Turn::Over,
                Ok(false) => return Turn::Wait,
                Err(e) => {
                    log::debug!("the connection of {}: {e}", self.client);
                    return Turn::Over;
                }
            }
        }
        Turn::Again
    }

    fn is_over(&self) -> bool {
        self.writing == Writing::Shut && self.client_ended && self.told
    }

    /// The deadline is over; so is the connection, unless its client goes on reading.
    pub(super) fn is_overdue(&mut self, now: Instant) -> bool {
        self.armed = None;
        if self.deadline.is_none_or(|d| now < d) {
            return false;
        }
        if self.writing == Writing::Answered {
            self.deadline = None;
            self.shut();
            return false;
        }
        let left = raw::unacknowledged_bytes(self.socket.as_raw_fd());
        let reads = self.writing == Writing::Shut && left > 0 && left < self.outstanding;
        (self.outstanding, self.deadline) = (left, Some(now + LINGER));
        !reads
    }

    /// From the client to the handler.
    fn carry_in(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let moved = if self.session.data().is_empty() { self.receive(buffer)? } else { self.deliver() };
        if moved || self.told || !self.session.data().is_empty() {
            return Ok(moved);
        }
        match self.session.end() {
            None if !self.client_ended => return Ok(false),
            None if self.session.is_cut() => self.abandon(None),
            None | Some(End::Close) => {}
            Some(End::Alert) => self.abandon(None),
            Some(End::Broken(alert)) => self.abandon(Some(alert)),
        }
        self.told = true;
        if let Some(handler) = &self.handler {
            // One that is gone need not be told.
            let _ = handler.shutdown(Shutdown::Write);
        }
        Ok(true)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.client_ready.read || self.client_ended {
            return Ok(false);
        }
        match self.socket.read(buffer) {
            Ok(0) => self.client_ended = true,
            Ok(n) => self.session.receive(&buffer[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.client_ready.read = false;
                return Ok(false);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    fn deliver(&mut self) -> bool {
        let Some(handler) = self.handler.as_mut().filter(|_| !self.deaf) else {
            self.session.used(self.session.data().len());
            return true;
        };
        if !self.handler_ready.write {
            return false;
        }
        match handler.write(self.session.data()) {
            Ok(n) => self.session.used(n),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.handler_ready.write = false;
                return false;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => self.deaf = true,
        }
        true
    }

    /// From the handler to the client.
    fn carry_out(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        if !self.session.pending().is_empty() {
            return self.flush();
        }
        match self.writing {
            Writing::Open => self.take(buffer),
            Writing::Hung => {
                let Some(word) = self.word else { return Ok(false) };
                self.end_with(word == Word::Done);
                Ok(true)
            }
            Writing::Ended { goodbye: true } => {
                self.session.say_goodbye();
                self.writing = Writing::Ended { goodbye: false };
                Ok(true)
            }
            Writing::Ended { goodbye: false } => {
                if self.session.end() == Some(End::Close) && !self.client_ended {
                    self.writing = Writing::Answered;
                    self.deadline = Some(Instant::now() + COURTESY);
                } else {
                    self.shut();
                }
                Ok(true)
            }
            Writing::Answered if self.client_ended => {
                self.shut();
                Ok(true)
            }
            Writing::Answered | Writing::Shut => Ok(false),
        }
    }

    fn shut(&mut self) {
        self.writing = Writing::Shut;
        self.wait_until_gone();
        // One that is gone already is noticed by reading.
        let _ = self.socket.shutdown(Shutdown::Write);
    }

    fn flush(&mut self) -> io::Result<bool> {
        if !self.client_ready.write {
            return Ok(false);
        }
        match self.socket.write(self.session.pending()) {
            Ok(n) => {
                self.session.taken(n);
                self.wait_until_gone();
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.client_ready.write = false;
                return Ok(false);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        Ok(true)
    }

    fn take(&mut self, buffer: &mut [u8]) -> io::Result<bool> {
        let Some(handler) = &mut self.handler else { return Ok(false) };
        if !self.handler_ready.read {
            return Ok(false);
        }
        match handler.read(buffer) {
            Ok(0) => self.handler_ended(),
            Ok(n) => {
                let sealed = self.session.send(&buffer[..n]);
                buffer[..n].zeroize();
                sealed.map_err(io::Error::other)?;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.handler_ready.read = false;
                let Some(word) = self.word else { return Ok(false) };
                self.end_with(word == Word::Done);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            // It has closed without reading all.
            Err(_) => self.handler_ended(),
        }
        Ok(true)
    }

    /// The handler writes nothing more. One that has only shut down its end says so itself.
    fn handler_ended(&mut self) {
        let closed = self.handler.as_ref().is_none_or(|h| raw::is_closed_both_ways(h.as_raw_fd()));
        match self.word {
            Some(word) => self.end_with(word == Word::Done),
            None if closed => self.writing = Writing::Hung,
            None => self.end_with(true),
        }
    }

    fn end_with(&mut self, goodbye: bool) {
        self.writing = Writing::Ended { goodbye };
        self.wait_until_gone();
    }

    /// The connection cannot go on; the handler sees its end, and an error when it writes.
    fn abandon(&mut self, alert: Option<u8>) {
        if let Some(alert) = alert {
            log::warn!("a record of {} cannot be read (alert {alert}): its connection ends", self.client);
            self.session.give_up(alert);
        }
        self.handler = None;
        if !matches!(self.writing, Writing::Answered | Writing::Shut) {
            self.end_with(false);
        }
    }

    /// A connection whose handler is gone lasts only as long as its client makes use of it.
    fn wait_until_gone(&mut self) {
        if self.word.is_none() && self.handler.is_some() {
            return;
        }
        let patience = match self.writing {
            Writing::Open | Writing::Hung | Writing::Ended { .. } => PATIENCE,
            Writing::Answered | Writing::Shut => LINGER,
        };
        self.outstanding = raw::unacknowledged_bytes(self.socket.as_raw_fd());
        self.deadline = Some(Instant::now() + patience);
    }
}

#[cfg(test)]
mod tests;
