//! A worker for a handler of mode `pool` (docs/HANDLERS.md): takes connections from xo-peerd, serves HTTP/1.1 on each of them in a
//! thread of its own, with as many requests as the client likes.
//!
//! `xo-pool-example [SOCKET]`: with SOCKET it connects there, and again when the daemon has been away; without, it uses the channel that
//! the daemon has started it with. `GET /.../bytes/N` is answered with N bytes, any other path with a line of text.

use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use xo_proto::pool::{FromWorker, MAX_MESSAGE, ToWorker, VERSION, decode, encode};
use xo_sys::fdpass;

/// Connections at once.
const CAPACITY: u32 = 64;
/// A connection on which nothing is asked for so long is closed.
const IDLE: Duration = Duration::from_secs(60);
/// Longest line of a request.
const LONGEST_LINE: usize = 16 << 10;
/// How often a daemon that is away is looked for.
const AGAIN: Duration = Duration::from_millis(200);

/// The way to the daemon, and the connections that came by it.
struct Channel {
    socket: OwnedFd,
    /// Connections of earlier channels that are still served: the daemon must not count on their room.
    older: u32,
}

impl Channel {
    fn send(&self, message: &FromWorker) -> io::Result<()> {
        fdpass::send(self.socket.as_raw_fd(), &encode(message), &[], 0)
    }
}

/// What all threads know.
#[derive(Default)]
struct Shared {
    channel: Option<Channel>,
    /// Which channel that is.
    generation: u64,
    open: u32,
}

impl Shared {
    /// A connection that came by the channel of this generation has been closed.
    fn closed(&mut self, generation: u64, connection: u64) {
        self.open -= 1;
        let Some(channel) = &mut self.channel else { return };
        let message = if generation == self.generation {
            FromWorker::Done { connection }
        } else {
            channel.older -= 1;
            FromWorker::Capacity { capacity: CAPACITY - channel.older }
        };
        // A daemon that is gone is noticed where messages are awaited.
        let _ = channel.send(&message);
    }
}

fn main() -> ExitCode {
    let socket = std::env::args_os().nth(1).map(PathBuf::from);
    let shared = Arc::new(Mutex::new(Shared::default()));
    loop {
        let result = channel(socket.as_deref()).map_err(Into::into).and_then(|fd| serve_channel(fd, &shared));
        let mut all = lock(&shared);
        all.channel = None;
        if let Err(e) = result {
            eprintln!("worker {}: {e}", std::process::id());
        }
        if socket.is_none() {
            break;
        }
        drop(all);
        thread::sleep(AGAIN);
    }
    // The daemon that started this worker is gone: what it has is finished.
    while lock(&shared).open > 0 {
        thread::sleep(AGAIN);
    }
    ExitCode::SUCCESS
}

fn lock(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new channel to the socket, or the one that the daemon has made.
fn channel(socket: Option<&std::path::Path>) -> io::Result<OwnedFd> {
    if let Some(path) = socket {
        return fdpass::connect(path).map(OwnedFd::from);
    }
    let number = std::env::var("XO_POOL_FD").ok().and_then(|n| n.parse::<RawFd>().ok());
    let number = number.ok_or_else(|| io::Error::other("neither a SOCKET nor XO_POOL_FD"))?;
    // SAFETY: the daemon has opened it for this purpose, and nothing else here uses it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes connections until the channel ends.
fn serve_channel(socket: OwnedFd, shared: &Arc<Mutex<Shared>>) -> Result<(), Box<dyn Error>> {
    let fd = socket.as_raw_fd();
    let generation = {
        let mut all = lock(shared);
        let channel = Channel { socket, older: all.open };
        channel.send(&FromWorker::Hello { version: VERSION, capacity: CAPACITY - all.open })?;
        all.channel = Some(channel);
        all.generation += 1;
        all.generation
    };
    let mut buffer = [0; MAX_MESSAGE];
    loop {
        let (n, [stream, ..]) = fdpass::recv(fd, &mut buffer, 0)?;
        if n == 0 {
            return Ok(());
        }
        match (decode::<ToWorker>(&buffer[..n])?, stream) {
            (ToWorker::Connection { connection, client, .. }, Some(stream)) => {
                lock(shared).open += 1;
                let (shared, stream) = (Arc::clone(shared), TcpStream::from(OwnedFd::from(stream)));
                thread::spawn(move || {
                    // A client that goes away, or sends nonsense, is its own affair.
                    let _ = serve(&stream, client);
                    drop(stream);
                    lock(&shared).closed(generation, connection);
                });
            }
            (ToWorker::Error { message }, _) => return Err(message.into()),
            // Nothing has to be done about the welcome.
            _ => {}
        }
    }
}

/// Answers a client's requests, one after the other.
fn serve(stream: &TcpStream, client: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    let mut input = BufReader::new(stream);
    while let Some((path, keep)) = request(&mut input)? {
        let bytes = path.rsplit_once("/bytes/").and_then(|(_, n)| n.parse::<usize>().ok());
        let body = match bytes {
            Some(n) => vec![b'x'; n.min(1 << 30)],
            None => format!("{path} for {}\n", client.ip()).into_bytes(),
        };
        let connection = if keep { "keep-alive" } else { "close" };
        let head = format!(
            "HTTP/1.1 200 OK\r\nX-Node: rust\r\nX-Worker: {}\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n",
            std::process::id(),
            body.len()
        );
        (&*stream).write_all(&[head.as_bytes(), &body].concat())?;
        if !keep {
            break;
        }
    }
    Ok(())
}

/// The path of the next request, and whether another may follow; `None` at the end of the connection.
fn request(input: &mut impl BufRead) -> io::Result<Option<(String, bool)>> {
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let Some(first) = line(input)? else { return Ok(None) };
    let mut words = first.split(' ');
    let (Some("GET"), Some(path), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(bad());
    };
    let (path, mut keep) = (path.to_owned(), version == "HTTP/1.1");
    loop {
        let field = line(input)?.ok_or_else(bad)?;
        if field.is_empty() {
            return Ok(Some((path, keep)));
        }
        let (name, value) = field.split_once(':').ok_or_else(bad)?;
        if name.eq_ignore_ascii_case("connection") {
            keep = !value.trim().eq_ignore_ascii_case("close");
        } else if name.eq_ignore_ascii_case("content-length") && value.trim() != "0"
            || name.eq_ignore_ascii_case("transfer-encoding")
        {
            return Err(bad());
        }
    }
}

/// A line without its end; `None` when the client has closed.
fn line(input: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let mut limited = io::Read::take(&mut *input, LONGEST_LINE as u64);
    if limited.read_until(b'\n', &mut line)? == 0 {
        return Ok(None);
    }
    let text = line.strip_suffix(b"\r\n").or_else(|| line.strip_suffix(b"\n"));
    let text = text.ok_or(io::ErrorKind::InvalidData)?;
    String::from_utf8(text.to_vec()).map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
}
