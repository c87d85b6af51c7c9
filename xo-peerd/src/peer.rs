//! One connection to another daemon: bytes in, messages out, and the other way round.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::TcpStream;
use rustls::Connection;
use xo_proto::frame::{FrameError, decode_peer, encode_peer};
use xo_proto::handoff::LIMITS;
use xo_proto::wire::{HandoffId, Hello, MAGIC, PeerMessage, Ping, VERSION};
use zeroize::Zeroize;

use crate::clock::now_ns;
use crate::tls;

/// How much is read at once: more than any message without long queues.
const READ: usize = 64 << 10;
/// How long a quick round trip vouches for the channel.
const PROVEN: Duration = Duration::from_secs(10);

/// Why a peer connection is given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    /// The connection failed or the TLS handshake did.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The peer closed it.
    #[error("closed by the peer")]
    Closed,
    /// The peer has not answered for too long.
    #[error("silent for too long")]
    Silent,
    /// The peer sent something that is not a message.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The peer is not who it says, or speaks another version.
    #[error("{0}")]
    Hello(String),
}

/// A connection to another daemon.
pub(crate) struct Peer {
    /// Higher than that of any earlier connection.
    pub(crate) serial: u64,
    stream: TcpStream,
    tls: Option<Box<Connection>>,
    input: Vec<u8>,
    output: Vec<u8>,
    scratch: Vec<u8>,
    /// What the peer said of itself, once it has.
    pub(crate) hello: Option<Hello>,
    /// For connections that we opened: the node we expect and its address.
    pub(crate) dialled: Option<(String, SocketAddr)>,
    /// The TCP connection is established.
    pub(crate) connected: bool,
    /// When the peer was last heard of.
    heard: Instant,
    /// The probe under way.
    probe: Option<(u64, Instant)>,
    probes: u64,
    /// When a probe last came back quickly.
    proven: Option<Instant>,
    /// Hand-offs that wait until the first probe is back.
    pub(crate) waiting: Vec<HandoffId>,
}

impl Peer {
    /// Takes over a TCP connection; `hello` is the first message we send.
    pub(crate) fn new(
        stream: TcpStream,
        tls: Option<Connection>,
        dialled: Option<(String, SocketAddr)>,
        hello: &Hello,
    ) -> Result<Peer, PeerError> {
        let connected = dialled.is_none();
        let tls = tls.map(|mut c| {
            // Messages are bounded by the frame limit, not by rustls' buffer.
            c.set_buffer_limit(None);
            Box::new(c)
        });
        let mut peer = Peer {
            serial: 0,
            stream,
            tls,
            input: Vec::with_capacity(READ),
            output: Vec::new(),
            scratch: vec![0; READ],
            hello: None,
            dialled,
            connected,
            heard: Instant::now(),
            probe: None,
            probes: 0,
            proven: None,
            waiting: Vec::new(),
        };
        peer.queue(&PeerMessage::Hello(hello.clone()))?;
        Ok(peer)
    }

    /// For registration with the poller.
    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    /// Node name for logs.
    pub(crate) fn name(&self) -> String {
        match (&self.hello, &self.dialled) {
            (Some(h), _) => h.node.clone(),
            (None, Some((node, _))) => node.clone(),
            (None, None) => self.stream.peer_addr().map_or_else(|_| "unknown peer".into(), |a| a.to_string()),
        }
    }

    /// Has it said that it is this node?
    pub(crate) fn is_node(&self, name: &str) -> bool {
        self.hello.as_ref().is_some_and(|h| h.node == name)
    }

    /// Is what is sent to it encrypted, and its certificate that of the node that it says it is?
    pub(crate) fn is_secure(&self) -> bool {
        self.tls.is_some() && self.usable()
    }

    /// Ready for hand-offs?
    pub(crate) fn usable(&self) -> bool {
        self.hello.is_some()
    }

    /// Closing it is to drop what is still to be sent: an old message must not arrive late.
    pub(crate) fn discard_unsent(&self) {
        let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
    }

    /// The channel is quick enough for the early order.
    pub(crate) fn is_proven(&self) -> bool {
        self.proven.is_some_and(|when| when.elapsed() < PROVEN)
    }

    /// Will it soon be known whether it is?
    pub(crate) fn is_on_trial(&self) -> bool {
        self.probes == 1 && self.probe.is_some_and(|(_, sent)| sent.elapsed() < LIMITS.sample)
    }

    /// How long the peer has been silent.
    pub(crate) fn silence(&self) -> Duration {
        self.heard.elapsed()
    }

    /// The next probe, unless one is under way.
    pub(crate) fn next_probe(&mut self) -> Option<PeerMessage> {
        if self.probe.is_some() || !self.usable() {
            return None;
        }
        self.probes += 1;
        self.probe = Some((self.probes, Instant::now()));
        Some(PeerMessage::Ping(Ping { number: self.probes, sent_ns: now_ns() }))
    }

    /// The answer to a probe.
    pub(crate) fn probed(&mut self, number: u64) {
        if let Some((_, sent)) = self.probe.take_if(|(n, _)| *n == number)
            && sent.elapsed() < LIMITS.sample
        {
            self.proven = Some(Instant::now());
        }
    }

    /// Sends a message now, or as soon as the socket takes it.
    pub(crate) fn send(&mut self, message: &PeerMessage) -> Result<(), PeerError> {
        self.queue(message)?;
        self.flush()
    }

    /// To be sent with the next flush.
    pub(crate) fn queue(&mut self, message: &PeerMessage) -> Result<(), PeerError> {
        let Some(tls) = &mut self.tls else { return Ok(encode_peer(message, &mut self.output)?) };
        self.scratch.clear();
        encode_peer(message, &mut self.scratch)?;
        tls.writer().write_all(&self.scratch)?;
        if message.has_secrets() {
            self.scratch.zeroize();
        }
        Ok(())
    }

    /// Writes what is queued; what the socket does not take waits for the next writable event.
    pub(crate) fn flush(&mut self) -> Result<(), PeerError> {
        if !self.connected {
            return Ok(());
        }
        let result = match &mut self.tls {
            Some(tls) => flush_tls(tls, &mut self.stream),
            None => flush_plain(&mut self.output, &mut self.stream),
        };
        match result {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
            other => Ok(other?),
        }
    }

    /// The poller says that the socket is writable: a dialled connection is up, or there is room again.
    pub(crate) fn writable(&mut self) -> Result<(), PeerError> {
        if !self.connected {
            if let Some(e) = self.stream.take_error()? {
                return Err(e.into());
            }
            match self.stream.peer_addr() {
                Ok(_) => self.connected = true,
                Err(e) if e.kind() == ErrorKind::NotConnected => return Ok(()),
                Err(e) => return Err(e.into()),
            }
            self.stream.set_nodelay(true)?;
        }
        self.flush()
    }

    /// Reads what is there; complete messages are appended to `messages`, the first one, `Hello`, is
    /// checked and kept in `self.hello`. `ends`: the end is to be looked for behind it.
    pub(crate) fn readable(&mut self, messages: &mut Vec<PeerMessage>, ends: bool) -> Result<(), PeerError> {
        let end = self.fill(ends);
        self.heard = Instant::now();
        let (mut used, mut secret) = (0, false);
        while let Some((message, n)) = decode_peer::<PeerMessage>(&self.input[used..])? {
            used += n;
            secret |= message.has_secrets();
            match (message, &self.hello) {
                (PeerMessage::Hello(hello), None) => self.greet(hello)?,
                (PeerMessage::Hello(_), Some(_)) => return Err(PeerError::Hello("a second hello".into())),
                (_, None) => return Err(PeerError::Hello("a message before the hello".into())),
                (message, Some(_)) => messages.push(message),
            }
        }
        if secret {
            self.input[..used].zeroize();
        }
        self.input.drain(..used);
        if self.input.is_empty() && self.input.capacity() > 4 * READ {
            self.input = Vec::with_capacity(READ);
        }
        end
    }

    /// Reads into `input` until the socket is empty.
    fn fill(&mut self, ends: bool) -> Result<(), PeerError> {
        let mut source = Source { stream: &mut self.stream, ends, is_empty: false };
        let result = match &mut self.tls {
            Some(tls) => fill_tls(tls, &mut source, &mut self.input),
            None => fill_plain(&mut source, &mut self.input, &mut self.scratch),
        };
        match result {
            Err(e) if e.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(PeerError::Closed),
            other => Ok(other?),
        }
    }

    fn greet(&mut self, hello: Hello) -> Result<(), PeerError> {
        if hello.magic != MAGIC || hello.version != VERSION {
            let text =
                format!("the peer speaks version {} of the protocol, we speak {VERSION}", hello.version);
            return Err(PeerError::Hello(text));
        }
        if self.tls.as_ref().is_some_and(|c| !tls::peer_is(c, &hello.node)) {
            return Err(PeerError::Hello(format!("the peer's certificate does not name '{}'", hello.node)));
        }
        if let Some((node, address)) = self.dialled.as_ref().filter(|(node, _)| *node != hello.node) {
            return Err(PeerError::Hello(format!("{address} is '{}', not '{node}'", hello.node)));
        }
        self.hello = Some(hello);
        Ok(())
    }
}

fn flush_plain(output: &mut Vec<u8>, stream: &mut TcpStream) -> io::Result<()> {
    let mut done = 0;
    let result = loop {
        if done == output.len() {
            break Ok(());
        }
        match stream.write(&output[done..]) {
            Ok(n) => done += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => break Err(e),
        }
    };
    output.drain(..done);
    result
}

fn flush_tls(tls: &mut Connection, stream: &mut TcpStream) -> io::Result<()> {
    while tls.wants_write() {
        match tls.write_tls(stream) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// What is read. A short read means that a stream socket is empty (epoll(7), question 9): one system call less. But where
/// the end has come with the last bytes, nothing tells of it again.
struct Source<'a> {
    stream: &'a mut TcpStream,
    ends: bool,
    is_empty: bool,
}

impl Read for Source<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.stream.read(buffer)?;
        self.is_empty = n < buffer.len() && !self.ends;
        Ok(n)
    }
}

fn fill_plain(source: &mut Source<'_>, input: &mut Vec<u8>, scratch: &mut Vec<u8>) -> io::Result<()> {
    scratch.resize(READ, 0);
    while !source.is_empty {
        match source.read(scratch) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => input.extend_from_slice(&scratch[..n]),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn fill_tls(tls: &mut Connection, source: &mut Source<'_>, input: &mut Vec<u8>) -> io::Result<()> {
    while !source.is_empty {
        let n = match tls.read_tls(source) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let state = tls.process_new_packets().map_err(|e| {
            // The alert tells the peer what we did not like.
            let _ = tls.write_tls(source.stream);
            io::Error::new(ErrorKind::InvalidData, e)
        })?;
        let plain = state.plaintext_bytes_to_read();
        if plain > 0 {
            let start = input.len();
            input.resize(start + plain, 0);
            tls.reader().read_exact(&mut input[start..])?;
        }
        if n == 0 || state.peer_has_closed() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        flush_tls(tls, source.stream)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mio::{Events, Interest, Poll, Token};

    /// Nothing tells a second time of an end that came with the last bytes.
    #[test]
    fn an_end_behind_the_last_bytes_is_seen_at_once() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let mut theirs =
            std::net::TcpStream::connect(listener.local_addr().expect("its address")).expect("connect");
        let (ours, _) = listener.accept().expect("accept");
        theirs.write_all(b"last").expect("write");
        drop(theirs);
        ours.set_nonblocking(true).expect("non-blocking");
        let mut stream = TcpStream::from_std(ours);
        let (mut poll, mut events) = (Poll::new().expect("poll"), Events::with_capacity(1));
        poll.registry().register(&mut stream, Token(0), Interest::READABLE).expect("register");
        while !events.iter().any(mio::event::Event::is_read_closed) {
            poll.poll(&mut events, None).expect("an event");
        }
        let (mut input, mut scratch) = (Vec::new(), Vec::new());
        let mut source = Source { stream: &mut stream, ends: true, is_empty: false };
        let end = fill_plain(&mut source, &mut input, &mut scratch);
        assert_eq!(input, b"last");
        assert!(end.is_err_and(|e| e.kind() == ErrorKind::UnexpectedEof));
    }
}
