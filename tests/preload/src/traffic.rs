//! Mixed traffic without end: clients that ask for small and large objects, upload, pipeline, dawdle, or leave in the
//! middle. Each checks every byte that it gets, and says which connections ended before their time.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::random::Random;
use crate::{Bed, Connection, Response, client, content};

/// Receive buffer of a client that reads slowly, bytes.
const SMALL_BUFFER: usize = 16 << 10;

/// The clients' common ground.
#[derive(Debug)]
pub struct Traffic {
    hosts: Vec<String>,
    roots: BTreeMap<String, PathBuf>,
    /// What has been counted.
    pub tally: Tally,
    stop: AtomicBool,
}

/// What has come of it so far.
#[derive(Debug, Default)]
pub struct Tally {
    /// Connections made.
    pub connections: AtomicU64,
    /// Connections seen to be served elsewhere than where they arrived.
    pub moved: AtomicU64,
    /// Connections that the client left in the middle.
    pub left: AtomicU64,
    /// Complete responses, each of them compared.
    pub responses: AtomicU64,
    /// Bytes of compared bodies, both ways.
    pub bytes: AtomicU64,
    /// Connections that ended before their time.
    pub losses: Mutex<Vec<Loss>>,
    /// What must not be, whoever was killed.
    pub wrong: Mutex<Vec<String>>,
}

/// A connection that was closed or reset while a response was due.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The node that served it last; empty when none has yet.
    pub node: String,
    /// Since when it may have been lost: when the request before the last complete response was sent; on a connection that
    /// may have moved since, when the last one was.
    pub since: Instant,
    /// When the end was noticed.
    pub at: Instant,
    /// What the client saw.
    pub what: String,
}

/// How a client behaves on one connection.
#[derive(Clone, Copy, Debug)]
enum Way {
    Ordinary,
    LastRequestCloses,
    Pipelined,
    Slow,
    Leaving,
}

/// A request.
struct Ask {
    path: String,
    bytes: Vec<u8>,
    /// Bytes of the body: the response's, or that of an upload.
    size: usize,
    upload: bool,
}

impl Traffic {
    /// Starts so many clients, which connect to the given addresses.
    pub fn start(
        bed: &Bed,
        hosts: &[String],
        clients: u64,
        seed: u64,
    ) -> (Arc<Traffic>, Vec<JoinHandle<()>>) {
        let traffic = Arc::new(Traffic {
            hosts: hosts.to_vec(),
            roots: bed.nodes().into_iter().map(|n| (n.clone(), bed.root(&n))).collect(),
            tally: Tally::default(),
            stop: AtomicBool::new(false),
        });
        let threads = (0..clients).map(|number| {
            let traffic = Arc::clone(&traffic);
            // Numbers far apart: the generators of neighbouring seeds must not walk the same way.
            let random = Random(seed.wrapping_mul(0x0100_0000_01b3) ^ (number << 40));
            bed.spawn("client", move || traffic.visit_again_and_again(number, random))
        });
        let threads = threads.collect();
        (traffic, threads)
    }

    /// Clients finish what they are doing, and stop.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn visit_again_and_again(&self, number: u64, mut r: Random) {
        for i in 0_u64.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let ways = [Way::Ordinary, Way::LastRequestCloses, Way::Pipelined, Way::Slow, Way::Leaving];
            let way = ways[r.of(&[0, 0, 0, 1, 1, 2, 2, 3, 4])];
            let host = &self.hosts[r.below(self.hosts.len())];
            let name = format!("{number}-{i}");
            match Connection::to(host, 80) {
                Ok(connection) => {
                    self.tally.connections.fetch_add(1, Ordering::Relaxed);
                    Visit::new(self, name, connection).run(way, &mut r);
                }
                Err(e) => self.wrong(format!("{name}: connect to {host}: {e}")),
            }
        }
    }

    fn wrong(&self, what: String) {
        self.tally.wrong.lock().unwrap_or_else(PoisonError::into_inner).push(what);
    }
}

/// One connection.
struct Visit<'t> {
    traffic: &'t Traffic,
    connection: Connection,
    name: String,
    /// The node that served last.
    node: String,
    since: Instant,
    /// When the last request was sent.
    sent: Instant,
    asked: u32,
    /// What the response that is read is for.
    path: String,
}

impl Visit<'_> {
    fn new(traffic: &Traffic, name: String, connection: Connection) -> Visit<'_> {
        let now = Instant::now();
        Visit {
            traffic,
            connection,
            name,
            node: String::new(),
            since: now,
            sent: now,
            asked: 0,
            path: String::new(),
        }
    }

    fn run(mut self, way: Way, r: &mut Random) {
        let result = match way {
            Way::Ordinary => self.ordinary(r),
            Way::LastRequestCloses => self.last_request_closes(r),
            Way::Pipelined => self.pipelined(r),
            Way::Slow => self.slow(r),
            Way::Leaving => self.leaving(r),
        };
        let Err(e) = result else { return };
        self.closed_by_server();
        let from = self.connection.stream().local_addr().map_or_else(|e| e.to_string(), |a| a.to_string());
        let what =
            format!("{way:?} {} from {from}, {}, served by '{}': {e}", self.name, self.path, self.node);
        match e.kind() {
            ErrorKind::UnexpectedEof
            | ErrorKind::ConnectionReset
            | ErrorKind::BrokenPipe
            | ErrorKind::ConnectionAborted
            | ErrorKind::NotConnected => {
                let loss = Loss { node: self.node, since: self.since, at: Instant::now(), what };
                self.traffic.tally.losses.lock().unwrap_or_else(PoisonError::into_inner).push(loss);
            }
            _ => self.traffic.wrong(what),
        }
    }

    fn ordinary(&mut self, r: &mut Random) -> io::Result<()> {
        for _ in 0..=r.below(4) {
            if r.one_in(4) {
                sleep(Duration::from_millis(r.below(300) as u64));
            }
            let ask = self.ask(r, usize::MAX, false);
            self.send(&ask.bytes)?;
            self.check(&ask)?;
        }
        self.say_good_bye()
    }

    fn last_request_closes(&mut self, r: &mut Random) -> io::Result<()> {
        for left in (0..=r.below(3)).rev() {
            let ask = self.ask(r, usize::MAX, left == 0);
            self.send(&ask.bytes)?;
            self.check(&ask)?;
        }
        self.nothing_more()?;
        self.closed_by_server();
        Ok(())
    }

    fn pipelined(&mut self, r: &mut Random) -> io::Result<()> {
        // A server that waits for us to read does not read itself, so all requests together must be short.
        let asks: Vec<_> = (0..=r.below(5)).map(|_| self.ask(r, 1 << 10, false)).collect();
        self.send(&asks.iter().flat_map(|a| a.bytes.iter().copied()).collect::<Vec<_>>())?;
        for ask in &asks {
            self.check(ask)?;
        }
        self.say_good_bye()
    }

    fn slow(&mut self, r: &mut Random) -> io::Result<()> {
        SockRef::from(self.connection.stream()).set_recv_buffer_size(SMALL_BUFFER)?;
        for _ in 0..=r.below(3) {
            sleep(Duration::from_millis(r.below(800) as u64));
            let ask = self.ask(r, 1 << 20, false);
            self.may_move();
            let pieces = 1 + r.below(20);
            let pause = Duration::from_millis(1 + r.below(5) as u64);
            self.connection.dribble(&ask.bytes, ask.bytes.len() / pieces + 1, pause)?;
            sleep(Duration::from_millis(r.below(200) as u64));
            self.check(&ask)?;
        }
        self.say_good_bye()
    }

    /// Goes while a request is on its way, is being handed over, or is being answered.
    fn leaving(&mut self, r: &mut Random) -> io::Result<()> {
        for _ in 0..r.below(2) {
            let ask = self.ask(r, usize::MAX, false);
            self.send(&ask.bytes)?;
            self.check(&ask)?;
        }
        let ask = self.ask(r, usize::MAX, false);
        let whole = !r.one_in(3);
        let end = if whole { ask.bytes.len() } else { r.below(ask.bytes.len()) };
        // From here on it does not matter what becomes of the connection.
        let _ = self.connection.send(&ask.bytes[..end]);
        sleep(Duration::from_micros(r.below(6000) as u64));
        if whole && r.one_in(2) {
            let _ = self.connection.stream().read(&mut [0; 300]);
        }
        if r.one_in(2) {
            SockRef::from(self.connection.stream()).set_linger(Some(Duration::ZERO))?;
        }
        self.traffic.tally.left.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn ask(&mut self, r: &mut Random, largest: usize, close: bool) -> Ask {
        let away = !r.one_in(4);
        let index = [(5, 0), (15, 1), (65, 2), (96, 3), (99, 4), (100, if r.one_in(10) { 5 } else { 4 })];
        let chosen = r.below(100);
        let index = index.iter().find(|(below, _)| chosen < *below).map_or(0, |(_, index)| *index);
        let upload = r.one_in(4);
        let (name, size) = content::SIZES[if upload { index.min(fitting(largest)) } else { index }];
        let close = if close { "Connection: close\r\n" } else { "" };
        self.asked += 1;
        if !upload {
            let path = format!("/{}/{name}", if away { "img" } else { "loc" });
            let bytes = format!("GET {path} HTTP/1.1\r\nHost: xo.test\r\n{close}\r\n").into_bytes();
            return Ask { path, bytes, size, upload };
        }
        let directory = if away { "up" } else { "put" };
        let path = format!("/{directory}/{}-{}-{name}", self.name, self.asked);
        let body = content::of(&path, size);
        let (field, coded) = if r.one_in(3) {
            ("Transfer-Encoding: chunked".to_owned(), chunked(&body, 1 + r.below(16 << 10)))
        } else {
            (format!("Content-Length: {size}"), body)
        };
        let head = format!("PUT {path} HTTP/1.1\r\nHost: xo.test\r\n{field}\r\n{close}\r\n");
        Ask { path, bytes: [head.as_bytes(), &coded].concat(), size, upload }
    }

    /// A connection that has not moved may do so from here on, and whoever takes it may be killed.
    fn may_move(&mut self) {
        self.sent = Instant::now();
        if !self.node.starts_with('t') {
            self.since = Instant::now();
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.may_move();
        self.connection.send(bytes)
    }

    /// The response to this request, and what it has done.
    fn check(&mut self, ask: &Ask) -> io::Result<()> {
        self.path.clone_from(&ask.path);
        let response: Response = if ask.upload {
            let response = self.connection.stored(&ask.path)?;
            let root = self.traffic.roots.get(response.node());
            let file = root.ok_or_else(|| io::Error::other(response.head.clone()))?.join(&ask.path[1..]);
            let stored = fs::read(&file).map_err(|e| io::Error::other(format!("{}: {e}", file.display())))?;
            client::same(&ask.path, &stored, &content::of(&ask.path, ask.size))?;
            fs::remove_file(file)?;
            response
        } else {
            self.connection.object(&ask.path)?
        };
        let tally = &self.traffic.tally;
        tally.responses.fetch_add(1, Ordering::Relaxed);
        tally.bytes.fetch_add(ask.size as u64, Ordering::Relaxed);
        let node = response.node();
        if self.node.starts_with('t') && node != self.node {
            return Err(io::Error::other(format!("{} answers instead of {}", node, self.node)));
        }
        if node.starts_with('t') && node != self.node {
            tally.moved.fetch_add(1, Ordering::Relaxed);
        }
        self.node = node.to_owned();
        // It may have waited here for some time.
        self.since = self.sent;
        Ok(())
    }

    /// Closes first, as most clients do.
    fn say_good_bye(&mut self) -> io::Result<()> {
        self.connection.stream().shutdown(Shutdown::Write)?;
        self.nothing_more()
    }

    /// A reset spares a server that has closed first a minute of TIME_WAIT.
    fn closed_by_server(&self) {
        let _ = SockRef::from(self.connection.stream()).set_linger(Some(Duration::ZERO));
    }

    fn nothing_more(&mut self) -> io::Result<()> {
        let rest = self.connection.rest()?;
        if rest.is_empty() {
            return Ok(());
        }
        Err(io::Error::other(format!("{} bytes more than asked for: {}", rest.len(), rest.escape_ascii())))
    }
}

fn fitting(largest: usize) -> usize {
    content::SIZES.iter().rposition(|(_, size)| *size <= largest).unwrap_or_default()
}

fn chunked(body: &[u8], size: usize) -> Vec<u8> {
    let mut coded = Vec::with_capacity(body.len() + 64);
    for piece in body.chunks(size) {
        coded.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        coded.extend_from_slice(piece);
        coded.extend_from_slice(b"\r\n");
    }
    coded.extend_from_slice(b"0\r\n\r\n");
    coded
}
