//! A plain HTTP/1.1 client that controls when which bytes are sent, which no library client lets one do.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use crate::content;
use crate::program::slowness;

/// Nothing takes this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// A connection to a server.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    /// Read and not yet used.
    buffer: Vec<u8>,
}

/// A response.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Head, as received.
    pub head: String,
    /// Body, chunked coding removed.
    pub body: Vec<u8>,
}

impl Response {
    /// A header field's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .filter_map(|l| l.split_once(':'))
            .find(|(n, _)| n.eq_ignore_ascii_case(name))
            .map(|(_, v)| v.trim())
    }

    /// The node that answered.
    #[must_use]
    pub fn node(&self) -> &str {
        self.header("X-Node").unwrap_or("?")
    }
}

fn broken(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// The other end has closed too early.
fn ended(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, text.into())
}

impl Connection {
    /// Connects from the calling thread's namespace.
    ///
    /// # Errors
    /// Of connect(2).
    pub fn to(address: &str, port: u16) -> io::Result<Connection> {
        let ip: IpAddr = address.parse().map_err(|_| broken("not an address"))?;
        let stream = TcpStream::connect_timeout(&SocketAddr::new(ip, port), PATIENCE * slowness())?;
        Connection::over(stream)
    }

    /// Takes over a connected socket.
    ///
    /// # Errors
    /// Of setsockopt(2).
    pub fn over(stream: TcpStream) -> io::Result<Connection> {
        stream.set_read_timeout(Some(PATIENCE * slowness()))?;
        stream.set_write_timeout(Some(PATIENCE * slowness()))?;
        stream.set_nodelay(true)?;
        Ok(Connection { stream, buffer: Vec::new() })
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of write(2).
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends bytes in pieces of `size` with pauses, each its own segment.
    ///
    /// # Errors
    /// Of write(2).
    pub fn dribble(&mut self, bytes: &[u8], size: usize, pause: Duration) -> io::Result<()> {
        for piece in bytes.chunks(size.max(1)) {
            self.stream.write_all(piece)?;
            std::thread::sleep(pause);
        }
        Ok(())
    }

    /// GET, the body compared with what the path holds.
    ///
    /// # Errors
    /// When anything is not as it should be.
    pub fn get(&mut self, path: &str) -> io::Result<Response> {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: xo.test\r\n\r\n").as_bytes())?;
        self.object(path)
    }

    /// The response to a GET of an object.
    ///
    /// # Errors
    /// When anything is not as it should be.
    pub fn object(&mut self, path: &str) -> io::Result<Response> {
        let response = self.response(false)?;
        let expected = content::of(path, content::size_of(path).unwrap_or_default());
        if response.status != 200 {
            return Err(broken(format!("{path}: {}", response.head)));
        }
        same(path, &response.body, &expected)?;
        Ok(response)
    }

    /// PUT; the body goes with the head when it is short, else right after it.
    ///
    /// # Errors
    /// When anything is not as it should be.
    pub fn put(&mut self, path: &str, body: &[u8]) -> io::Result<Response> {
        let head = format!("PUT {path} HTTP/1.1\r\nHost: xo.test\r\nContent-Length: {}\r\n\r\n", body.len());
        self.send(&[head.as_bytes(), body].concat())?;
        self.stored(path)
    }

    /// The response to a PUT.
    ///
    /// # Errors
    /// When anything is not as it should be.
    pub fn stored(&mut self, path: &str) -> io::Result<Response> {
        let response = self.response(false)?;
        if matches!(response.status, 201 | 204) {
            Ok(response)
        } else {
            Err(broken(format!("{path}: {}", response.head)))
        }
    }

    /// The next response; interim ones are skipped. `headless`: it answers a HEAD.
    ///
    /// # Errors
    /// When the stream ends early or is no HTTP.
    pub fn response(&mut self, headless: bool) -> io::Result<Response> {
        loop {
            let response = self.any_response(headless)?;
            if response.status >= 200 {
                return Ok(response);
            }
        }
    }

    /// The next response, interim or not.
    ///
    /// # Errors
    /// When the stream ends early or is no HTTP.
    pub fn any_response(&mut self, headless: bool) -> io::Result<Response> {
        let end = loop {
            if let Some(i) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break i + 4;
            }
            if self.more()? == 0 {
                let text = String::from_utf8_lossy(&self.buffer).into_owned();
                return Err(ended(format!("the stream ends after {} bytes of a head: {text:?}", text.len())));
            }
        };
        let head = String::from_utf8_lossy(&self.buffer[..end]).into_owned();
        self.buffer.drain(..end);
        let status = head.split(' ').nth(1).and_then(|s| s.parse().ok());
        let status = status.ok_or_else(|| broken(format!("not a response: {head:?}")))?;
        let mut response = Response { status, head, body: Vec::new() };
        if headless || status < 200 || status == 204 || status == 304 {
            return Ok(response);
        }
        let length = response.header("Content-Length").and_then(|v| v.parse::<usize>().ok());
        response.body = match length {
            Some(n) => self.exactly(n)?,
            None if response.header("Transfer-Encoding") == Some("chunked") => self.chunks()?,
            None => self.rest()?,
        };
        Ok(response)
    }

    /// Everything up to the end of the stream.
    ///
    /// # Errors
    /// Of read(2).
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        while self.more()? > 0 {}
        Ok(std::mem::take(&mut self.buffer))
    }

    /// The next `n` bytes.
    ///
    /// # Errors
    /// When the stream ends early.
    pub fn exactly(&mut self, n: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < n {
            if self.more()? == 0 {
                return Err(ended(format!("the stream ends after {} of {n} bytes", self.buffer.len())));
            }
        }
        let rest = self.buffer.split_off(n);
        Ok(std::mem::replace(&mut self.buffer, rest))
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line()?;
            let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16);
            let size = size.map_err(|_| broken(format!("chunk size {line:?}")))?;
            if size == 0 {
                while !self.line()?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.exactly(size)?);
            self.line()?;
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(i) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let line = String::from_utf8_lossy(&self.buffer[..i]).into_owned();
                self.buffer.drain(..i + 2);
                return Ok(line);
            }
            if self.more()? == 0 {
                return Err(ended("the stream ends in a line"));
            }
        }
    }

    fn more(&mut self) -> io::Result<usize> {
        let start = self.buffer.len();
        self.buffer.resize(start + (64 << 10), 0);
        // A read with a time limit ends with EINTR when the process was stopped meanwhile (signal(7)).
        let n = loop {
            match self.stream.read(&mut self.buffer[start..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                n => break n,
            }
        };
        self.buffer.truncate(start + *n.as_ref().unwrap_or(&0));
        n
    }

    /// Segment size that the other end uses towards us, and that we use, bytes (`tcpi_rcv_mss`, `tcpi_snd_mss`).
    #[must_use]
    pub fn segment_sizes(&self) -> (u32, u32) {
        // SAFETY: all zero is valid; the kernel writes at most `len` bytes.
        unsafe {
            let mut info: libc::tcp_info = std::mem::zeroed();
            let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
            libc::getsockopt(
                self.stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut len,
            );
            (info.tcpi_rcv_mss, info.tcpi_snd_mss)
        }
    }
}

/// Compares bytes; says where they differ.
///
/// # Errors
/// When they do.
pub fn same(what: &str, got: &[u8], expected: &[u8]) -> io::Result<()> {
    if got == expected {
        return Ok(());
    }
    let at = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(got.len().min(expected.len()));
    Err(broken(format!("{what}: {} bytes instead of {}, different at {at}", got.len(), expected.len())))
}

/// Connects from an address and port of ours.
///
/// # Errors
/// Of the calls made.
pub fn bound(ip: &str, port: u16, to: &str, to_port: u16) -> io::Result<TcpStream> {
    let address =
        |ip: &str, port| ip.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, port)).map_err(|_| broken(ip));
    let (from, to) = (address(ip, port)?, address(to, to_port)?);
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&from.into())?;
    socket.connect(&to.into())?;
    Ok(socket.into())
}
