//! nginx without the library, before an upstream that tells what it was sent.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use std::{env, io, process, thread};

use crate::Connection;
use crate::program::{Program, wait_for};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running nginx. Below `/plain` it answers itself and discards bodies, everywhere else it asks the upstream, whose
/// answer has a field `X-Seen` (see [`seen`]). For hosts that begin with `path` it answers with the path that it looks up.
#[derive(Debug)]
pub struct Plain {
    program: Program,
    directory: PathBuf,
    port: u16,
}

impl Plain {
    /// Starts it on a free port of 127.0.0.1.
    ///
    /// # Panics
    /// When it does not listen in time.
    #[must_use]
    pub fn start() -> Plain {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = env::temp_dir().join(format!("xo-plain-{}n{number}", process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        // The workers run as another user.
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("its mode");
        let upstream = directory.join("upstream.sock");
        let _ = fs::remove_file(&upstream);
        let listener = UnixListener::bind(&upstream).expect("the upstream's socket");
        fs::set_permissions(&upstream, fs::Permissions::from_mode(0o777)).expect("its mode");
        thread::spawn(move || listener.incoming().flatten().for_each(|c| drop(answer(c))));

        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let d = directory.display();
        let config = format!(
            "user www-data; worker_processes 1; daemon off; pid {d}/nginx.pid; error_log {d}/error.log;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; keepalive_requests 1000000; client_max_body_size 0;\n\
             client_header_timeout 5s; client_body_timeout 5s; lingering_timeout 1s;\n\
             client_body_temp_path {d}/body; proxy_temp_path {d}/proxy;\n\
             server {{ listen 127.0.0.1:{port};\n\
             location / {{ proxy_pass http://unix:{}; }}\n\
             location /plain {{ return 200 plain; }} }}\n\
             server {{ listen 127.0.0.1:{port}; server_name ~^path; location / {{ return 200 $uri; }} }} }}\n",
            upstream.display(),
        );
        let path = directory.join("nginx.conf");
        fs::write(&path, config).expect("a configuration");
        let mut command = Command::new("nginx");
        command.args(["-e", "stderr", "-c"]).arg(path).env_remove("LD_PRELOAD");
        let here = File::open("/proc/thread-self/ns/net").expect("own namespace");
        let mut program = Program::start("nginx", &here, &directory.join("output.log"), &mut command);
        let listens = wait_for(Duration::from_secs(20), || {
            assert!(program.is_alive(), "ended: {}", program.output());
            Connection::to("127.0.0.1", port).is_ok()
        });
        assert!(listens, "nginx does not listen: {}", program.output());
        Plain { program, directory, port }
    }

    /// A new connection to it.
    ///
    /// # Panics
    /// When it does not take one.
    #[must_use]
    pub fn connect(&self) -> Connection {
        Connection::to("127.0.0.1", self.port).unwrap_or_else(|e| panic!("{e}: {}", self.program.output()))
    }

    /// The end of its error log.
    #[must_use]
    pub fn last_error(&self) -> String {
        let log = fs::read_to_string(self.directory.join("error.log")).unwrap_or_default();
        log.lines().last().unwrap_or_default().to_owned()
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What the upstream says about a request: method, target, length and a hash of the body.
#[must_use]
pub fn seen(method: &str, target: &str, body: &[u8]) -> String {
    let hash = |bytes: &[u8]| {
        bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
    };
    format!("{method} {:x} {} {:x}", hash(target.as_bytes()), body.len(), hash(body))
}

/// nginx has read the whole body before it asks, and sends it with its length.
fn answer(stream: UnixStream) -> io::Result<()> {
    let mut input = BufReader::new(&stream);
    let (mut first, mut length) = (None, 0);
    loop {
        let mut line = Vec::new();
        input.read_until(b'\n', &mut line)?;
        let line = String::from_utf8_lossy(&line).trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':').filter(|_| first.is_some())
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
        first.get_or_insert(line);
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    let first = first.unwrap_or_default();
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let seen = seen(method, target, &body);
    (&stream)
        .write_all(format!("HTTP/1.0 200 OK\r\nContent-Length: 2\r\nX-Seen: {seen}\r\n\r\nok").as_bytes())
}
