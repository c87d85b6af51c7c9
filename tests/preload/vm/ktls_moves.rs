//! A TLS connection moves between namespaces and goes on in the kernel there: TCP by repair mode, records by kTLS. The
//! client is OpenSSL, and must not notice; every version and suite. The network is switched over by routes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::crypto::ring::{cipher_suite, default_provider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ConnectionTrafficSecrets, ServerConfig, ServerConnection, SupportedCipherSuite};
use xo_proto::conn::ConnRecord;
use xo_sys::ktls::{self, CLOSE_NOTIFY, Direction, Keys, Suite, Version, kind};
use xo_sys::tcp_repair::{self, SpareSockets};
use xo_tests::Bed;
use xo_tests::bed::{built, root};
use xo_tests::counters::Counters;
use xo_tests::program::{enter, wait_for};
use xo_tests::servers::address;

const PORT: u16 = 443;
/// Length of the longer responses, bytes: several records and many segments.
const LONG: usize = 120_000;
const LIMIT: Duration = Duration::from_secs(30);

const SUITES: [(Version, Suite, SupportedCipherSuite); 6] = [
    (Version::Tls12, Suite::Aes128Gcm, cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    (Version::Tls12, Suite::Aes256Gcm, cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    (Version::Tls12, Suite::ChaCha20Poly1305, cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    (Version::Tls13, Suite::Aes128Gcm, cipher_suite::TLS13_AES_128_GCM_SHA256),
    (Version::Tls13, Suite::Aes256Gcm, cipher_suite::TLS13_AES_256_GCM_SHA384),
    (Version::Tls13, Suite::ChaCha20Poly1305, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256),
];

/// The client's program (programs/tls_client.py).
struct Client {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Client {
    fn start(bed: &Bed, ca: &Path, version: Version) -> Client {
        let script = root().join("tests/preload/programs/tls_client.py");
        let version = if version == Version::Tls12 { "TLSv1_2" } else { "TLSv1_3" };
        let mut command = Command::new("python3");
        command.arg("-B").arg(script).args([&address("host"), &PORT.to_string()]).arg(ca).arg(version);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        enter(&mut command, &bed.namespace("client"));
        let mut child = command.spawn().expect("python3");
        let to = child.stdin.take().expect("a pipe");
        let from = BufReader::new(child.stdout.take().expect("a pipe"));
        Client { child, to, from }
    }

    fn tell(&mut self, order: &str) {
        writeln!(self.to, "{order}").expect("the client is there");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("an answer");
        line.trim_end().to_owned()
    }

    fn does(&mut self, order: &str, expected: &str) {
        self.tell(order);
        assert_eq!(self.answer(), expected, "{order}");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What all connections of a test have in common.
struct Stage {
    bed: Bed,
    certs: PathBuf,
    listener: TcpListener,
    file: PathBuf,
    long: Vec<u8>,
    digest: String,
}

impl Stage {
    fn new() -> Stage {
        let bed = Bed::up(2, 1);
        let certs = bed.directory().join("certs");
        bed.run("host", Command::new(built("xo-peerd")).arg("certs").arg(&certs).arg("host"));
        let long = xo_tests::content::of("long", LONG);
        let file = bed.file("long", "");
        std::fs::write(&file, &long).expect("a file");
        let sum = bed.run("host", Command::new("sha256sum").arg(&file));
        let digest = sum.split(' ').next().unwrap_or_default().to_owned();
        for target in ["t1", "t2"] {
            // The host's address, as a source; the way to it is the router's to choose.
            ip(&bed, target, &format!("addr add {}/32 dev lo", address("host")));
        }
        let listener = bed.on("host", || TcpListener::bind((address("host"), PORT)).expect("listen"));
        Stage { bed, certs, listener, file, long, digest }
    }

    /// Packets for the host's address go to this node, or nowhere.
    fn steer(&self, node: Option<&str>) {
        let host = address("host");
        let route = match node {
            Some("host") => format!("route del {host}/32"),
            Some(node) => format!("route replace {host}/32 via {}", address(node)),
            // Where there is no socket, a late window update would be answered with a reset.
            None => format!("route replace blackhole {host}/32"),
        };
        ip(&self.bed, "router", &route);
    }

    /// A client, and the connection as its server has it, after the handshake in user space.
    fn connect(
        &self,
        version: Version,
        suite: SupportedCipherSuite,
    ) -> (Client, TcpStream, ServerConnection) {
        let mut client = Client::start(&self.bed, &self.certs.join("ca.pem"), version);
        let (mut socket, _) = self.listener.accept().expect("accept");
        socket.set_read_timeout(Some(LIMIT)).expect("a time-out");
        let mut provider = default_provider();
        provider.cipher_suites = vec![suite];
        let chain = CertificateDer::pem_file_iter(self.certs.join("host.pem")).expect("a certificate");
        let chain = chain.collect::<Result<_, _>>().expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(self.certs.join("host.key")).expect("a key");
        let config =
            ServerConfig::builder_with_provider(Arc::new(provider)).with_safe_default_protocol_versions();
        let config = config.expect("versions").with_no_client_auth().with_single_cert(chain, key);
        let mut config = config.expect("a configuration");
        config.enable_secret_extraction = true;
        let mut tls = ServerConnection::new(Arc::new(config)).expect("a server");
        while tls.is_handshaking() || tls.wants_write() {
            tls.complete_io(&mut socket).expect("a handshake");
        }
        println!("{}", client.answer());
        (client, socket, tls)
    }

    /// Restores a connection on a node and gives it the keys.
    fn restore(&self, node: &str, record: ConnRecord, dumped: Instant, keys: [Keys; 2]) -> TcpStream {
        let socket = self.bed.on(node, move || {
            let mut spare = SpareSockets::default();
            let restored = tcp_repair::restore(&record, record.local, false, dumped.elapsed(), &mut spare);
            let live = restored.expect("restore").start(false, dumped.elapsed()).expect("start");
            TcpStream::from(OwnedFd::from(live))
        });
        install(&socket, keys);
        socket.set_read_timeout(Some(LIMIT)).expect("a time-out");
        socket
    }

    /// Sends the long file without reading it, after a short piece.
    fn respond(&self, mut socket: &TcpStream, client: &mut Client) {
        socket.write_all(b"short").expect("write");
        let file = File::open(&self.file).expect("the file");
        client.does("receive 5", "f9b0078b5df596d2ea19010c001bbd009e651de2c57e8fb7e355f31eb9d3f739");
        client.tell(&format!("receive {LONG}"));
        let mut left = self.long.len();
        while left > 0 {
            // SAFETY: open descriptors and numbers; the file's own offset is used.
            let n =
                unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), std::ptr::null_mut(), left) };
            left -= usize::try_from(n)
                .unwrap_or_else(|_| panic!("sendfile: {}", std::io::Error::last_os_error()));
        }
        assert_eq!(client.answer(), self.digest, "the long response");
    }
}

fn ip(bed: &Bed, node: &str, arguments: &str) {
    bed.run(node, Command::new("ip").args(arguments.split(' ')));
}

fn install(socket: &TcpStream, [send, receive]: [Keys; 2]) {
    ktls::attach(socket.as_raw_fd()).expect("the layer");
    ktls::install(socket.as_raw_fd(), Direction::Send, &send).expect("keys to send with");
    ktls::install(socket.as_raw_fd(), Direction::Receive, &receive).expect("keys to receive with");
}

/// What a server in user space knows, as the kernel takes it.
fn extracted(tls: ServerConnection, version: Version) -> [Keys; 2] {
    let secrets = tls.dangerous_extract_secrets().expect("secrets");
    [secrets.tx, secrets.rx].map(|(seq, secret)| {
        let (suite, key, iv) = match &secret {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Suite::Aes128Gcm, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Suite::Aes256Gcm, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Suite::ChaCha20Poly1305, key, iv),
            _ => panic!("another suite"),
        };
        let mut iv: [u8; 12] = iv.as_ref().try_into().expect("12 bytes");
        if version == Version::Tls12 && suite != Suite::ChaCha20Poly1305 {
            // The nonces so far were this value with the sequence number XORed in; the kernel counts up.
            iv[4] ^= 0x80;
        }
        Keys::new(version, suite, key.as_ref(), iv, seq).expect("a key of the right length")
    })
}

/// Waits until the client has acknowledged everything: nothing is in the send queue.
fn wait_acknowledged(socket: &TcpStream) {
    let empty = wait_for(LIMIT, || {
        let mut n = 0_i32;
        // SAFETY: a number that may be written.
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
        n == 0
    });
    assert!(empty, "the client does not acknowledge");
}

fn reads(mut socket: &TcpStream, text: &str) {
    let mut got = vec![0; text.len()];
    socket.read_exact(&mut got).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(String::from_utf8_lossy(&got), text);
}

fn is_readable(socket: &TcpStream, limit: Duration) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which may be written.
    unsafe { libc::poll(&raw mut poll, 1, i32::try_from(limit.as_millis()).expect("short")) > 0 }
}

/// One connection: a user-space server, then the kernel on t1, then on t2. Of the request that makes it move, `cut` bytes
/// of the record have come by then; 0: all.
fn journey(
    stage: &Stage,
    (version, suite, rustls_suite): (Version, Suite, SupportedCipherSuite),
    cut: usize,
) {
    let (mut client, socket, mut tls) = stage.connect(version, rustls_suite);
    client.does("send first 0", "done");
    let mut stream = rustls::Stream { conn: &mut tls, sock: &mut &socket };
    let mut first = [0; 5];
    stream.read_exact(&mut first).expect("the first request");
    stream.write_all(b"short").expect("write");
    client.does("receive 5", "f9b0078b5df596d2ea19010c001bbd009e651de2c57e8fb7e355f31eb9d3f739");

    // The next request waits, encrypted and unread, in the queue that is dumped.
    client.does(&format!("send second-request {cut}"), "done");
    let overhead = if version == Version::Tls12 && suite != Suite::ChaCha20Poly1305 { 29 } else { 21 };
    let inner_type = usize::from(version == Version::Tls13);
    let record_len = "second-request".len() + overhead + inner_type;
    let waiting = if cut == 0 { record_len } else { cut };
    assert!(wait_for(LIMIT, || socket.peek(&mut [0; 100]).expect("peek") == waiting), "the request");
    wait_acknowledged(&socket);
    stage.steer(None);
    let ends = tcp_repair::ends(socket.as_raw_fd()).expect("ends");
    let dumped = Instant::now();
    let record = tcp_repair::dump(socket.as_raw_fd(), &ends, 1 << 20).expect("dump");
    assert_eq!(record.tcp.received.len(), waiting);
    tcp_repair::vacate(socket.as_raw_fd()).expect("vacate");
    let keys = extracted(tls, version);
    assert_eq!(keys[0].suite, suite);
    let on_t1 = stage.restore("t1", record, dumped, keys);
    stage.steer(Some("t1"));
    assert_eq!(is_readable(&on_t1, Duration::ZERO), cut == 0, "readiness, by what has come");
    if cut != 0 {
        client.does("rest", "done");
        assert!(is_readable(&on_t1, LIMIT), "the rest of the record");
    }
    reads(&on_t1, "second-request");
    stage.respond(&on_t1, &mut client);

    // From kernel to kernel: with what the kernel says.
    wait_acknowledged(&on_t1);
    stage.steer(None);
    let keys =
        [Direction::Send, Direction::Receive].map(|d| ktls::read(on_t1.as_raw_fd(), d).expect("state"));
    let dumped = Instant::now();
    let record = tcp_repair::dump_drained(on_t1.as_raw_fd(), &ends).expect("dump");
    let refused =
        tcp_repair::vacate(on_t1.as_raw_fd()).expect_err("no kernel empties such a socket in place");
    assert_eq!(refused.raw_os_error(), Some(libc::EOPNOTSUPP), "{refused}");
    // In repair mode: without a packet.
    drop(on_t1);
    let on_t2 = stage.restore("t2", record, dumped, keys);
    stage.steer(Some("t2"));
    client.does("send third 0", "done");
    reads(&on_t2, "third");
    stage.respond(&on_t2, &mut client);

    // Both say good-bye properly.
    ktls::send_record(on_t2.as_raw_fd(), kind::ALERT, &CLOSE_NOTIFY, 0).expect("close_notify");
    client.does("end", "closed");
    let mut answer = [0; 2];
    let got = ktls::receive_record(on_t2.as_raw_fd(), &mut answer, 0).expect("the client's close_notify");
    assert_eq!((got, answer), ((kind::ALERT, 2), CLOSE_NOTIFY));
    drop((on_t2, socket, client));
    stage.steer(Some("host"));
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn a_connection_goes_on_in_another_machines_kernel_and_the_client_notices_nothing() {
    let stage = Stage::new();
    for (i, one) in SUITES.into_iter().enumerate() {
        // A whole record, one that is cut in its head, one that is cut in its middle: each with either version.
        let cut = [0, 3, 17][i % 3];
        let begun = Instant::now();
        let before = Counters::of(&stage.bed);
        journey(&stage, one, cut);
        let counted = Counters::of(&stage.bed).since(&before);
        let about = format!("{:?} {:?}, cut at {cut}: {}", one.0, one.1, counted.troubles());
        println!("{about} ({} ms)", begun.elapsed().as_millis());
        assert_eq!((counted.resets(), counted.losses()), (0, 0), "{about}");
    }
}

#[test]
#[ignore = "needs a kernel with TLS: scripts/vm"]
fn what_has_not_been_read_keeps_a_connection_where_it_is() {
    let stage = Stage::new();
    let (version, suite, rustls_suite) = SUITES[3];
    let (mut client, socket, tls) = stage.connect(version, rustls_suite);
    let keys = extracted(tls, version);
    assert_eq!(keys[1].suite, suite);
    install(&socket, keys);
    let fd = socket.as_raw_fd();
    let ends = tcp_repair::ends(fd).expect("ends");
    let refused = || {
        let reason = tcp_repair::dump_drained(fd, &ends).expect_err("something waits").reason();
        assert!(!tcp_repair::in_repair(fd));
        reason
    };
    let plain = tcp_repair::dump(fd, &ends, 1 << 20).expect_err("a dump that does not know of TLS").reason();
    assert_eq!(plain, xo_proto::reason::Reason::NotMovable);
    // A record of which a part has come, a whole one, one that has been read in part.
    client.does("send some-request 10", "done");
    assert!(wait_for(LIMIT, || xo_sys::raw::readable_bytes(fd) == 10), "a part of the record");
    assert_eq!(refused(), xo_proto::reason::Reason::QueuesTooLong);
    client.does("rest", "done");
    assert!(is_readable(&socket, LIMIT));
    assert_eq!(refused(), xo_proto::reason::Reason::QueuesTooLong);
    reads(&socket, "some");
    assert_eq!(refused(), xo_proto::reason::Reason::QueuesTooLong);
    reads(&socket, "-request");
    stage.respond(&socket, &mut client);
    wait_acknowledged(&socket);
    tcp_repair::dump_drained(fd, &ends).expect("an idle connection");
    tcp_repair::resume(fd).expect("resume");
    stage.respond(&socket, &mut client);
}
