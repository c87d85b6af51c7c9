//! HTTPS: servers with certificates, daemons with an encrypted channel, and a client that says what it got.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::{Value, json};

use crate::Bed;
use crate::bed::built;
use crate::content;
use crate::kinds::{Kind, Server};
use crate::program::{Program, enter, wait_for};
use crate::servers::{PEER_PORT, PeerdOptions, WEB, address};

/// A cipher suite, and the version of TLS that has it.
pub type Suite = (&'static str, &'static str);

/// Those that can move, by OpenSSL's names.
pub const SUITES: [Suite; 8] = [
    ("TLSv1.3", "TLS_AES_128_GCM_SHA256"),
    ("TLSv1.3", "TLS_AES_256_GCM_SHA384"),
    ("TLSv1.3", "TLS_CHACHA20_POLY1305_SHA256"),
    ("TLSv1.2", "ECDHE-RSA-AES128-GCM-SHA256"),
    ("TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ("TLSv1.2", "ECDHE-RSA-CHACHA20-POLY1305"),
    ("TLSv1.2", "DHE-RSA-AES128-GCM-SHA256"),
    ("TLSv1.2", "AES256-GCM-SHA384"),
];

/// What clients in Python begin with: `address`, `port`, `root` and `options` of the command line, and a `context` of the
/// version and ciphers that the options name.
pub(crate) const CLIENT_HEAD: &str = r#"
import json, os, socket, ssl, sys, time

address, port, root, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
if 'version' in options:
    version = getattr(ssl.TLSVersion, options['version'].replace('.', '_'))
    context.minimum_version = context.maximum_version = version
if 'ciphers' in options:
    context.set_ciphers(options['ciphers'])
"#;

/// A client on TLS: `client.py ADDRESS PORT ROOT OPTIONS`. Options are JSON: `version`, `alpn`, `chunk` (bytes for each record that
/// is sent), `goodbye` (close_notify at the end, and the server's is waited for), `connections` (later ones resume the first's session), `steps` (`["GET", path]` or `["PUT", path, size]`). What is
/// served is compared with the file below ROOT, and so is what was uploaded.
const CLIENT: &str = r#"
import http.client

if 'alpn' in options:
    context.set_alpn_protocols(options['alpn'])
session, connections = None, []

def send(s, data):
    chunk = options.get('chunk', 1 << 14)
    for at in range(0, len(data), chunk):
        s.sendall(data[at:at + chunk])
        if 'pause' in options:
            time.sleep(options['pause'])

def step(s, method, path, size=None):
    body = b'' if size is None else bytes(i * 7 % 251 for i in range(65521)) * (size // 65521 + 1)
    body = body[:size]
    head = f'{method} {path} HTTP/1.1\r\nHost: x\r\n'
    if size is not None:
        head += f'Content-Length: {size}\r\n'
    send(s, (head + '\r\n').encode() + body)
    response = http.client.HTTPResponse(s, method=method)
    response.begin()
    got = response.read()
    right = response.status in (200, 201, 204)
    with open(root + path, 'rb') as f:
        right = right and f.read() == (got if size is None else body)
    return [response.getheader('X-Node'), right]

for _ in range(options.get('connections', 1)):
    plain = socket.create_connection((address, port))
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(plain, server_hostname='a.example', session=session) as s:
        steps = [step(s, *arguments) for arguments in options['steps']]
        session = s.session
        connections.append({'steps': steps, 'version': s.version(), 'suite': s.cipher()[0],
                            'resumed': s.session_reused})
        if options.get('goodbye'):
            s.unwrap()
print(json.dumps(connections))
"#;

/// Objects and uploads below a root, on a port: `https.py NODE ROOT KEYS PORT`, with KEYS.pem and KEYS.key if the port is 443.
const SERVER: &str = r#"
import http.server, os, ssl, sys

node, root, keys, port = sys.argv[1:5]

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 60

    def answer(self, status, body=b''):
        self.send_response(status)
        self.send_header('X-Node', node)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        with open(root + self.path, 'rb') as f:
            self.answer(200, f.read())

    def do_PUT(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        with open(root + self.path, 'wb') as f:
            f.write(body)
        self.answer(201)

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(('', int(port)), Handler)
server.daemon_threads = True
if port == '443':
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys + '.pem', keys + '.key')
    if 'KEYS' in os.environ:
        context.keylog_filename = os.environ['KEYS']
    # The handshake is the connection's own thread's.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
"#;

/// A bed whose host and target have certificates: the daemons for their channel, the servers for their clients.
#[derive(Debug)]
pub struct Https {
    /// The bed: a host and a target.
    pub bed: Bed,
    /// More lines for the head of all daemons' configurations.
    pub head: String,
}

impl Https {
    /// Raises it; nothing runs yet.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn up() -> Https {
        Https::with_targets(1)
    }

    /// As [`Https::up`], with so many targets.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn with_targets(targets: u32) -> Https {
        let bed = Bed::up(targets, 1);
        let certs = bed.directory().join("certs");
        bed.run("host", Command::new(built("xo-peerd")).arg("certs").arg(certs).args(bed.servers()));
        for (name, key) in
            [("rsa", &["rsa:2048"][..]), ("ec", &["ec", "-pkeyopt", "ec_paramgen_curve:P-256"])]
        {
            let mut command = Command::new("openssl");
            command
                .args(["req", "-x509", "-nodes", "-days", "2", "-subj", "/CN=a.example", "-newkey"])
                .args(key);
            command.arg("-keyout").arg(bed.directory().join(format!("{name}.key")));
            bed.run("host", command.arg("-out").arg(bed.directory().join(format!("{name}.pem"))));
        }
        Https { bed, head: String::new() }
    }

    /// Daemons on all nodes.
    pub fn daemons(&self) -> Vec<Program> {
        self.daemons_for("# the channel is encrypted", WEB)
    }

    /// As [`Https::daemons`], with this at the head of their configuration, and these handlers.
    pub fn daemons_for(&self, head: &str, handlers: &str) -> Vec<Program> {
        let options = |node: &str| {
            let d = self.bed.directory().join("certs");
            let d = d.display();
            let tls =
                format!("[tls]\nca = \"{d}/ca.pem\"\ncert = \"{d}/{node}.pem\"\nkey = \"{d}/{node}.key\"\n");
            PeerdOptions { head: format!("{head}\n{}", self.head), sections: tls + handlers }
        };
        self.bed.servers().iter().map(|node| self.bed.peerd(node, &options(node))).collect()
    }

    /// As [`Bed::preloaded`], with a policy for HTTPS: `/img/` and `/up/` go to the target. Every record that the server sends is
    /// opened again.
    #[must_use]
    pub fn preloaded(&self, node: &str, program: &str) -> Command {
        let text = format!(
            "listen = [80, 443, 444]\n[targets]\nt1 = \"{}:{PEER_PORT}\"\n\
             [[rule]]\npath_prefix = \"/img/\"\nto = [\"t1\"]\nhandler = \"web\"\n\
             [[rule]]\npath_prefix = \"/up/\"\nto = [\"t1\"]\nhandler = \"web\"\n",
            address("t1"),
        );
        let mut command = self.bed.preloaded(node, program);
        command.env("XO_POLICY", self.bed.file("https.toml", &text)).env("XO_TLS_CHECK", "1");
        command
    }

    /// nginx on a node: port 443, and port 444, where it asks for the client's certificate. `more` is for the first.
    pub fn nginx(&self, node: &str, command: Command, more: &str) -> Program {
        let config = fs::read_to_string(self.bed.nginx_config(node, 2)).expect("nginx's configuration");
        let d = self.bed.directory().display();
        let keys = format!(
            "ssl_certificate {d}/rsa.pem; ssl_certificate_key {d}/rsa.key;\n\
             ssl_certificate {d}/ec.pem; ssl_certificate_key {d}/ec.key;\n\
             ssl_protocols TLSv1.2 TLSv1.3; ssl_ciphers ALL:@SECLEVEL=0; ssl_dhparam {d}/dh.pem;\n"
        );
        let dh = Command::new("openssl")
            .args(["dhparam", "-dsaparam", "-out"])
            .arg(self.bed.directory().join("dh.pem"))
            .arg("1024")
            .output();
        assert!(dh.is_ok_and(|o| o.status.success()), "openssl dhparam");
        let root = format!("root {}; add_header X-Node {node} always;", self.bed.root(node).display());
        let asking = format!(
            "server {{ listen 444 ssl; {root} {keys} ssl_verify_client optional_no_ca;\n\
             ssl_client_certificate {d}/rsa.pem; }} }}\n"
        );
        let config = config.replace(
            "listen 80; listen [::]:80;",
            &format!(
                "listen 80; listen [::]:80; listen 443 ssl http2; listen [::]:443 ssl http2; {keys} {more}"
            ),
        );
        let end = config.rfind('}').expect("a block");
        let path = self.bed.file(&format!("{node}-https.conf"), &format!("{}{asking}", &config[..end]));
        let mut program = self.bed.nginx_configured(node, command, &path);
        self.bed.wait_listening(node, 443, &mut program);
        program
    }

    /// Python's `http.server` with its `ssl` on port 443 of a node.
    pub fn python(&self, node: &str, command: Command) -> Program {
        self.python_on(node, 443, command)
    }

    /// As [`Https::python`], on another port without `ssl`.
    pub fn python_on(&self, node: &str, port: u16, mut command: Command) -> Program {
        let root = self.bed.root(node);
        if !root.exists() {
            content::write_all(&root);
        }
        let keys = self.bed.directory().join("rsa");
        command.arg(self.bed.file("https.py", SERVER)).arg(node).arg(root).arg(keys);
        command.arg(port.to_string());
        let mut program = self.bed.start(node, &format!("{node}-python"), &mut command);
        self.bed.wait_listening(node, port, &mut program);
        program
    }

    /// Another server with TLS, on port 443 of a node.
    ///
    /// # Panics
    /// For nginx and Python, which have functions of their own, and lighttpd, whose module for TLS is another package; when it
    /// does not listen.
    pub fn server(&self, kind: Kind, node: &str) -> Server {
        self.server_as(kind, node, |program| self.preloaded(node, program))
    }

    /// As [`Https::server`]; `command` makes the command for a program's name.
    ///
    /// # Panics
    /// As there.
    pub fn server_as(&self, kind: Kind, node: &str, command: impl FnOnce(&str) -> Command) -> Server {
        let d = self.bed.directory().display();
        let pair: String = ["rsa.pem", "rsa.key"]
            .iter()
            .map(|f| fs::read_to_string(self.bed.directory().join(f)).expect("certificate and key"))
            .collect();
        let both = self.bed.file("rsa-both.pem", &pair);
        let both = both.display();
        let edit = |text: &str| match kind {
            Kind::Haproxy => {
                let plain = " bind :::80 v4v6\n";
                assert!(text.contains(plain));
                text.replace(plain, &format!("{plain} bind :::443 v4v6 ssl crt {both}\n"))
            }
            Kind::ApacheEvent | Kind::ApachePrefork => {
                let root = self.bed.root(node);
                format!(
                    "{text}LoadModule ssl_module /usr/lib/apache2/modules/mod_ssl.so\nListen 443\n\
                     <VirtualHost *:443>\nDocumentRoot {}\nSSLEngine on\nSSLCertificateFile {d}/rsa.pem\n\
                     SSLCertificateKeyFile {d}/rsa.key\n</VirtualHost>\n",
                    root.display()
                )
            }
            Kind::Nginx | Kind::Python | Kind::Lighttpd => panic!("{kind:?} is not started here"),
        };
        let mut server = kind.start_with(&self.bed, node, command, edit);
        self.bed.wait_listening(node, 443, &mut server.program);
        server
    }

    /// Runs the client against a port of the host. `suite` is one of [`SUITES`].
    ///
    /// # Panics
    /// When it fails.
    pub fn client(&self, port: u16, suite: Option<Suite>, mut options: Value) -> Value {
        let script = self.bed.file("client.py", &format!("{CLIENT_HEAD}{CLIENT}"));
        let mut command = Command::new("python3");
        command.arg(script).args([address("host"), port.to_string()]).arg(self.bed.root("host"));
        if let Some(suite) = suite {
            options = self.say_suite(&mut command, suite, options);
        }
        let output = self.bed.run("client", command.arg(options.to_string()));
        serde_json::from_str(&output).unwrap_or_else(|e| panic!("{e}: {output}"))
    }

    /// The client is to offer only this suite.
    pub(crate) fn say_suite(
        &self,
        command: &mut Command,
        (version, name): Suite,
        mut options: Value,
    ) -> Value {
        options["version"] = json!(version);
        if version == "TLSv1.3" {
            command.env("OPENSSL_CONF", self.tls13_only(name));
        } else {
            options["ciphers"] = json!(format!("{name}:@SECLEVEL=0"));
        }
        options
    }

    /// Configuration of an OpenSSL that offers only this suite of TLS 1.3; Python cannot say it otherwise.
    fn tls13_only(&self, name: &str) -> PathBuf {
        let text = format!(
            "openssl_conf = init\n[init]\nssl_conf = ssl\n[ssl]\nsystem_default = default\n[default]\nCiphersuites = {name}\n"
        );
        self.bed.file(&format!("{name}.cnf"), &text)
    }

    /// How often hand-offs were refused for this reason, at the host.
    #[must_use]
    pub fn refused(&self, reason: &str) -> u64 {
        self.counter("refused_by_reason", reason)
    }

    /// What the host's libraries have counted under this name.
    #[must_use]
    pub fn counted(&self, name: &str) -> u64 {
        self.counter("library", name)
    }

    fn counter(&self, of: &str, name: &str) -> u64 {
        let status = self.bed.try_status("host").expect("a daemon that answers");
        status[of].get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    /// All that has been counted of connections with TLS, for a message.
    #[must_use]
    pub fn about(&self) -> String {
        let status = self.bed.try_status("host").expect("a daemon that answers");
        format!("{} {}", status["refused_by_reason"], status["library"])
    }
}

/// `openssl s_client`, spoken to line by line.
#[derive(Debug)]
pub struct Interactive {
    child: Child,
    said: Arc<Mutex<String>>,
}

impl Interactive {
    /// Connects to the host with these options.
    ///
    /// # Panics
    /// When it cannot.
    #[must_use]
    pub fn start(https: &Https, options: &str) -> Interactive {
        let text = format!("exec openssl s_client -crlf {options} -connect {}:443 2>&1", address("host"));
        let mut command = Command::new("sh");
        command.args(["-c", &text]).stdin(Stdio::piped()).stdout(Stdio::piped());
        enter(&mut command, &https.bed.namespace("client"));
        let mut child = command.spawn().expect("openssl s_client");
        let said = Arc::new(Mutex::new(String::new()));
        let (mut output, all) = (child.stdout.take().expect("its output"), said.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                all.lock().expect("no panic").push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let mut client = Interactive { child, said };
        client.say("", "Verify return code");
        client
    }

    /// Says something, and waits for this in the answer; empty: for nothing.
    ///
    /// # Panics
    /// When it does not come.
    pub fn say(&mut self, text: &str, answer: &str) {
        let count = |said: &str| said.matches(answer).count();
        let before = if text.is_empty() { 0 } else { count(&self.said.lock().expect("no panic")) };
        let input = self.child.stdin.as_mut().expect("its input");
        input.write_all(text.as_bytes()).expect("it reads");
        if answer.is_empty() {
            // It takes what it is told in one read, and a command only when it has a read to itself.
            let read = wait_for(Duration::from_secs(20), || waits_in(input) == 0);
            assert!(read, "{text} is not read");
            return;
        }
        let answered =
            wait_for(Duration::from_secs(20), || count(&self.said.lock().expect("no panic")) > before);
        assert!(answered, "no answer to {text}: {}", self.said.lock().expect("no panic"));
    }
}

/// How much of what was written into a pipe has not been read, bytes.
fn waits_in(pipe: &ChildStdin) -> libc::c_int {
    let mut n: libc::c_int = 0;
    // SAFETY: an open descriptor, and a place for the number.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut n) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    n
}

impl Drop for Interactive {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
