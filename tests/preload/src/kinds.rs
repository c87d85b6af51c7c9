//! Servers other than nginx, each serving the objects of its node and taking uploads by PUT.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Bed;
use crate::content;
use crate::program::Program;

/// A server from a Debian package.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nginx with two workers.
    Nginx,
    /// HAProxy in http mode, with two threads, before an nginx of the same node.
    Haproxy,
    /// lighttpd; uploads go to a CGI script.
    Lighttpd,
    /// Apache with threads and epoll.
    ApacheEvent,
    /// Apache with a process for each connection.
    ApachePrefork,
    /// Python's `http.server`, a thread for each connection.
    Python,
}

/// A running server; what it needs besides goes with it.
#[derive(Debug)]
pub struct Server {
    /// The process that listens, and its descendants.
    pub program: Program,
    _backend: Option<Program>,
}

impl From<Program> for Server {
    fn from(program: Program) -> Server {
        Server { program, _backend: None }
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Nginx => "nginx",
            Kind::Haproxy => "haproxy",
            Kind::Lighttpd => "lighttpd",
            Kind::ApacheEvent => "apache-event",
            Kind::ApachePrefork => "apache-prefork",
            Kind::Python => "python",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Kind::ApacheEvent | Kind::ApachePrefork => "apache2",
            Kind::Python => "python3",
            other => other.name(),
        }
    }

    /// Starts one on port 80 of a node; `command` makes the command for a program's name, under the library or not.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn start(self, bed: &Bed, node: &str, command: impl FnOnce(&str) -> Command) -> Server {
        self.start_with(bed, node, command, str::to_owned)
    }

    /// As [`Kind::start`]; `edit` makes of the configuration what is wanted instead (not nginx's or Python's).
    ///
    /// # Panics
    /// When it does not listen.
    pub fn start_with(
        self,
        bed: &Bed,
        node: &str,
        command: impl FnOnce(&str) -> Command,
        edit: impl Fn(&str) -> String,
    ) -> Server {
        let root = bed.root(node);
        if !root.exists() {
            content::write_all(&root);
        }
        let mut backend = None;
        let mut command = command(self.program());
        match self {
            Kind::Nginx => {
                command.args(["-e", "stderr", "-c"]).arg(bed.nginx_config(node, 2));
            }
            Kind::Haproxy => {
                backend = Some(nginx_behind(bed, node));
                command
                    .args(["-db", "-f"])
                    .arg(bed.file(&format!("{node}-haproxy.cfg"), &edit(&haproxy(node))));
            }
            Kind::Lighttpd => {
                command.args(["-D", "-f"]).arg(lighttpd(bed, node, &root, edit));
            }
            Kind::ApacheEvent => {
                command.args(["-DFOREGROUND", "-f"]).arg(apache(bed, node, &root, "event", edit));
            }
            Kind::ApachePrefork => {
                command.args(["-DFOREGROUND", "-f"]).arg(apache(bed, node, &root, "prefork", edit));
            }
            Kind::Python => {
                command.arg(bed.file("objects.py", PYTHON)).arg(node).arg(&root).arg("80");
            }
        }
        let mut program = bed.start(node, &format!("{node}-{}", self.name()), &mut command);
        bed.wait_listening(node, 80, &mut program);
        Server { program, _backend: backend }
    }
}

/// nginx on the node's own port 8081, never under the library.
fn nginx_behind(bed: &Bed, node: &str) -> Program {
    let config = bed.nginx_config(node, 1);
    let text = fs::read_to_string(&config).expect("nginx's configuration");
    let text = text
        .replace("listen 80; listen [::]:80;", "listen 127.0.0.1:8081;")
        .replace("-nginx.pid", "-behind.pid")
        .replace("-nginx-error.log", "-behind-error.log");
    let config = bed.file(&format!("{node}-behind.conf"), &text);
    let mut command = Command::new("nginx");
    command.args(["-e", "stderr", "-c"]).arg(config);
    let mut program = bed.start(node, &format!("{node}-behind"), &mut command);
    bed.wait_listening(node, 8081, &mut program);
    program
}

fn haproxy(node: &str) -> String {
    format!(
        "global\n nbthread 2\n maxconn 2000\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n\
         timeout server 60s\n timeout http-keep-alive 60s\nfrontend web\n bind :::80 v4v6\n\
         http-after-response set-header X-Node {node}\n default_backend objects\nbackend objects\n\
         option http-server-close\n http-reuse never\n server local 127.0.0.1:8081\n"
    )
}

fn lighttpd(bed: &Bed, node: &str, root: &Path, edit: impl Fn(&str) -> String) -> PathBuf {
    let root = root.display();
    let store = format!(
        "#!/bin/sh\ncat > \"{root}$REQUEST_URI\"\n\
         printf 'Status: 201\\r\\nX-Node: {node}\\r\\nContent-Length: 0\\r\\n\\r\\n'\n"
    );
    let path = bed.root(node).join("store.cgi");
    fs::write(&path, store).expect("the script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("its mode");
    let text = format!(
        "server.modules = (\"mod_setenv\", \"mod_cgi\", \"mod_rewrite\")\n\
         server.document-root = \"{root}\"\nserver.port = 80\nserver.max-keep-alive-requests = 100000\n\
         server.max-keep-alive-idle = 60\nserver.max-connections = 1000\nserver.max-fds = 3000\n\
         server.errorlog = \"/dev/stderr\"\nserver.upload-dirs = (\"{}\")\n\
         server.bind = \"[::]\"\nserver.set-v6only = \"disable\"\n\
         setenv.add-response-header = (\"X-Node\" => \"{node}\")\n\
         $HTTP[\"request-method\"] == \"PUT\" {{\n setenv.add-response-header = ()\n\
         url.rewrite-once = (\"\" => \"/store.cgi\")\n cgi.assign = (\".cgi\" => \"\")\n}}\n",
        bed.directory().display(),
    );
    bed.file(&format!("{node}-lighttpd.conf"), &edit(&text))
}

fn apache(bed: &Bed, node: &str, root: &Path, mpm: &str, edit: impl Fn(&str) -> String) -> PathBuf {
    let locks = bed.directory().join(format!("{node}-dav"));
    fs::create_dir_all(&locks).expect("a directory");
    fs::set_permissions(&locks, fs::Permissions::from_mode(0o777)).expect("its mode");
    let (directory, root, locks) = (bed.directory().display(), root.display(), locks.display());
    let mut text = format!(
        "ServerRoot {directory}\nServerName {node}\nPidFile {directory}/{node}-apache.pid\n\
         User www-data\nGroup www-data\nErrorLog /dev/stderr\nMutex file:{directory}\nListen 80\n"
    );
    for module in ["mpm", "authz_core", "authz_host", "headers", "dav", "dav_fs", "reqtimeout"] {
        let file = if module == "mpm" { format!("mpm_{mpm}") } else { module.into() };
        text += &format!("LoadModule {file}_module /usr/lib/apache2/modules/mod_{file}.so\n");
    }
    let processes = if mpm == "event" {
        // One process can serve all connections of a test: with no thread idle it closes those that wait.
        "StartServers 2\nServerLimit 2\nThreadsPerChild 64\nMaxRequestWorkers 128\nMinSpareThreads 1\nMaxSpareThreads 128\n"
    } else {
        // A wake-up connection carries no data, so TCP_DEFER_ACCEPT would keep it from the server.
        "StartServers 40\nServerLimit 40\nMaxRequestWorkers 40\nMinSpareServers 1\nMaxSpareServers 40\n"
    };
    text += processes;
    text += &format!(
        "KeepAlive On\nMaxKeepAliveRequests 0\nKeepAliveTimeout 60\nDavLockDB {locks}/db\n\
         DocumentRoot {root}\nHeader always set X-Node {node}\n\
         <Directory {root}>\nRequire all granted\nDav On\n</Directory>\n"
    );
    bed.file(&format!("{node}-apache.conf"), &edit(&text))
}

/// Objects and uploads below a root: `objects.py NODE ROOT PORT`.
const PYTHON: &str = r#"
import http.server, os, socket, sys

node, root, port = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    wbufsize = -1
    timeout = 60

    def answer(self, status, body=b''):
        self.send_response(status)
        self.send_header('X-Node', node)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_GET(self):
        try:
            with open(root + self.path, 'rb') as f:
                self.answer(200, f.read())
        except OSError:
            self.answer(404)

    do_HEAD = do_GET

    def do_PUT(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        with open(root + self.path, 'wb') as f:
            f.write(body)
        self.answer(201)

    def log_message(self, *arguments):
        pass

class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    request_queue_size = 512
    daemon_threads = True

Server(('', port), Handler).serve_forever()
"#;
