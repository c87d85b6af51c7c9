//! XO's record layer for handlers that are programs of their own (`exec`, `pool`), where it is not the kernel's: the handler is given
//! one end of a socket pair, and a thread of this daemon's passes on what comes at either side, records to the client and plain bytes to
//! the handler (`relay/pipe.rs`; the records themselves are `xo_proto::tls::Session`'s).
//!
//! One thread has all such connections, so that neither they wait for hand-offs nor hand-offs for them. It knows nothing of
//! handlers: how the end of one is meant - done with the connection, or crashed - the engine tells it, and it tells the engine when one
//! has closed its end, and when a connection is over.

mod pipe;

use std::collections::{BTreeSet, HashMap};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use xo_proto::tls::{MAX_PLAINTEXT, Session};
use xo_sys::tcp_repair::Repaired;

pub(crate) use self::pipe::Word;
use self::pipe::{Pipe, Side, Turn};
use crate::engine::{Engine, ServedKey};

/// Bytes that are read at a time: four records.
const PORTION: usize = 4 * MAX_PLAINTEXT;
const WAKER: Token = Token(usize::MAX);
/// How long a handler that has closed its end, and has not ended, may take to say how that is meant. A process that ends closes its
/// descriptors before anybody can know of its end.
const GRACE: Duration = Duration::from_secs(1);

enum Order {
    /// A connection that is live now.
    Take(u64, Box<Pipe>),
    Tell(u64, Word),
}

enum Report {
    /// Its handler has closed its end.
    Hung(u64),
    /// It is over, its socket is closed.
    Over(u64),
}

/// The way to the thread.
#[derive(Clone)]
struct Line {
    orders: Sender<Order>,
    waker: Arc<Waker>,
}

impl Line {
    fn say(&self, order: Order) {
        // The thread ends with the daemon.
        if self.orders.send(order).is_ok() {
            let _ = self.waker.wake();
        }
    }
}

/// The thread, as the engine has it.
pub(crate) struct Relay {
    line: Line,
    reports: Receiver<Report>,
    keys: HashMap<u64, ServedKey>,
    /// Connections whose handlers have closed their ends, and when.
    hung: Vec<(Instant, ServedKey)>,
    last: u64,
}

/// A connection, as the engine has it. Dropped, it is cut off.
pub(crate) struct Relayed {
    line: Line,
    number: u64,
    /// Plain bytes that could be read at first.
    pub(crate) waiting: u32,
    /// Until it begins.
    pipe: Option<Box<Pipe>>,
    /// The handler's end of the pair, until it is given away.
    theirs: Option<OwnedFd>,
}

impl Relay {
    /// Starts the thread, which tells by `engine` that it has something to say.
    pub(crate) fn start(engine: Arc<Waker>) -> io::Result<Relay> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let (orders, todo) = channel();
        let (out, reports) = channel();
        let thread = Thread {
            poll,
            todo,
            out,
            engine,
            pipes: HashMap::new(),
            ready: Vec::new(),
            deadlines: BTreeSet::new(),
            buffer: vec![0; PORTION],
        };
        std::thread::Builder::new().name("xo-relay".into()).spawn(move || thread.run())?;
        let line = Line { orders, waker };
        Ok(Relay { line, reports, keys: HashMap::new(), hung: Vec::new(), last: 0 })
    }

    /// All that a connection will need, taken while it can still be refused. Dropped before it has begun, it leaves no trace.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(crate) fn prepare(
        &mut self,
        key: &ServedKey,
        restored: &Repaired,
        client: SocketAddr,
        (session, waiting): (Box<Session>, u32),
    ) -> io::Result<Relayed> {
        let (ours, theirs) = UnixStream::pair()?;
        let pipe = Box::new(Pipe::new(restored.try_clone()?, ours, session, client)?);
        self.last += 1;
        self.keys.insert(self.last, key.clone());
        Ok(Relayed {
            line: self.line.clone(),
            number: self.last,
            waiting,
            pipe: Some(pipe),
            theirs: Some(theirs.into()),
        })
    }
}

impl Relayed {
    /// What its handler is to be given.
    pub(crate) fn take_end(&mut self) -> Option<OwnedFd> {
        self.theirs.take()
    }

    /// The connection is live, and has a handler: it begins.
    pub(crate) fn begin(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            self.line.say(Order::Take(self.number, pipe));
        }
    }

    /// Its handler has done with it.
    pub(crate) fn say_goodbye(self) {
        self.line.say(Order::Tell(self.number, Word::Done));
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        // After a good-bye this changes nothing.
        self.line.say(Order::Tell(self.number, Word::Cut));
    }
}

impl Engine {
    /// The thread may have something to say.
    pub(crate) fn on_relay(&mut self) {
        while let Some(report) = self.records.relay.as_mut().and_then(|r| r.reports.try_recv().ok()) {
            let Some(relay) = &mut self.records.relay else { return };
            match report {
                Report::Hung(number) => {
                    let key = relay.keys.get(&number).cloned();
                    relay.hung.extend(key.map(|key| (Instant::now() + GRACE, key)));
                }
                Report::Over(number) => {
                    if let Some(key) = relay.keys.remove(&number) {
                        self.expect_end(&key);
                    }
                }
            }
        }
    }

    /// Every tick: handlers that have closed their ends some time ago, and live, have done with their connections.
    pub(crate) fn look_at_hung(&mut self, now: Instant) {
        let Some(relay) = &mut self.records.relay else { return };
        let due = relay.hung.extract_if(.., |(when, _)| now >= *when).collect::<Vec<_>>();
        for (_, key) in due {
            self.say_goodbye(&key);
        }
    }
}

/// What the thread has.
struct Thread {
    poll: Poll,
    todo: Receiver<Order>,
    out: Sender<Report>,
    engine: Arc<Waker>,
    pipes: HashMap<u64, Box<Pipe>>,
    /// Connections that something has happened to.
    ready: Vec<u64>,
    /// When which connection is to be looked at; an entry may be out of date.
    deadlines: BTreeSet<(Instant, u64)>,
    buffer: Vec<u8>,
}

fn tokens(number: u64) -> [Token; 2] {
    let first = (number as usize) << 1;
    [Token(first), Token(first | 1)]
}

impl Thread {
    fn run(mut self) {
        let mut events = Events::with_capacity(256);
        loop {
            match self.poll.poll(&mut events, self.timeout()) {
                Err(e) if e.kind() != ErrorKind::Interrupted => {
                    // Nothing can be served without it, and nothing can be told to those that are served.
                    log::error!("the relay of connections with TLS: {e}");
                    std::process::abort();
                }
                _ => {}
            }
            events.iter().filter(|e| e.token() != WAKER).for_each(|event| self.happened(event));
            loop {
                match self.todo.try_recv() {
                    Ok(order) => self.carry_out(order),
                    Err(TryRecvError::Empty) => break,
                    // The engine is gone.
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            let mut ready = std::mem::take(&mut self.ready);
            ready.sort_unstable();
            ready.dedup();
            ready.into_iter().for_each(|number| self.turn(number));
            self.look_at_deadlines();
        }
    }

    fn happened(&mut self, event: &Event) {
        let Token(token) = event.token();
        let side = if token & 1 == 0 { Side::Client } else { Side::Handler };
        let number = (token >> 1) as u64;
        if let Some(pipe) = self.pipes.get_mut(&number) {
            pipe.happened(side, event);
            self.ready.push(number);
        }
    }

    fn timeout(&self) -> Option<Duration> {
        if !self.ready.is_empty() {
            return Some(Duration::ZERO);
        }
        self.deadlines.first().map(|(when, _)| when.saturating_duration_since(Instant::now()))
    }

    fn carry_out(&mut self, order: Order) {
        match order {
            Order::Take(number, pipe) => {
                pipe.begin();
                let (client, handler) = pipe.descriptors();
                let interest = Interest::READABLE | Interest::WRITABLE;
                for (fd, token) in [Some(client), handler].into_iter().zip(tokens(number)) {
                    let Some(fd) = fd else { continue };
                    if let Err(e) = self.poll.registry().register(&mut SourceFd(&fd), token, interest) {
                        log::error!("relaying a connection: {e}");
                        return self.over(number, &pipe);
                    }
                }
                self.pipes.insert(number, pipe);
                self.ready.push(number);
            }
            Order::Tell(number, word) => {
                if let Some(pipe) = self.pipes.get_mut(&number) {
                    pipe.hear(word);
                    self.ready.push(number);
                } else {
                    // One that was never begun is over with that.
                    self.report(Report::Over(number));
                }
            }
        }
    }

    fn turn(&mut self, number: u64) {
        let Some(pipe) = self.pipes.get_mut(&number) else { return };
        let asked = pipe.asks();
        match pipe.turn(&mut self.buffer) {
            Turn::Again => self.ready.push(number),
            Turn::Wait => {}
            Turn::Over => return self.end(number),
        }
        let asks = pipe.asks() && !asked;
        self.deadlines.extend(pipe.arm().map(|when| (when, number)));
        if asks {
            self.report(Report::Hung(number));
        }
    }

    fn look_at_deadlines(&mut self) {
        let now = Instant::now();
        while let Some((when, number)) = self.deadlines.first().copied().filter(|(when, _)| *when <= now) {
            self.deadlines.remove(&(when, number));
            let Some(pipe) = self.pipes.get_mut(&number) else { continue };
            if pipe.is_overdue(now) {
                self.end(number);
            } else {
                self.deadlines.extend(pipe.arm().map(|when| (when, number)));
            }
        }
    }

    fn end(&mut self, number: u64) {
        if let Some(pipe) = self.pipes.remove(&number) {
            self.over(number, &pipe);
        }
    }

    fn over(&self, number: u64, pipe: &Pipe) {
        let (client, handler) = pipe.descriptors();
        for fd in [Some(client), handler].into_iter().flatten() {
            // The engine may have another descriptor of the same socket, so closing this one would not do.
            let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
        }
        self.report(Report::Over(number));
    }

    fn report(&self, report: Report) {
        if self.out.send(report).is_ok() {
            let _ = self.engine.wake();
        }
    }
}
