//! `/metrics` for Prometheus: a thread of its own that serves the text the engine last published.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The text, renewed by the engine.
pub(crate) type Published = Arc<Mutex<String>>;

const PATIENCE: Duration = Duration::from_secs(2);
const MAX_REQUEST: usize = 4096;

/// Serves `text` at `address` from now on.
pub(crate) fn serve(address: SocketAddr, text: Published) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    std::thread::Builder::new().name("xo-metrics".into()).spawn(move || {
        for stream in listener.incoming() {
            if let Err(e) = stream.and_then(|s| answer(s, &text)) {
                log::debug!("metrics: {e}");
            }
        }
    })?;
    Ok(())
}

fn answer(mut stream: TcpStream, text: &Published) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") && request.len() < MAX_REQUEST {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            n => request.extend_from_slice(&buffer[..n]),
        }
    }
    let found = request.starts_with(b"GET /metrics ") || request.starts_with(b"GET /metrics?");
    let (status, body) = if found {
        ("200 OK", text.lock().unwrap_or_else(PoisonError::into_inner).clone())
    } else {
        ("404 Not Found", "see /metrics\n".to_owned())
    };
    let kind = "text/plain; version=0.0.4";
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}
