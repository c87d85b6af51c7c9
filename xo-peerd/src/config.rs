//! `peerd.toml`.

use std::collections::HashSet;
use std::ffi::CString;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use serde::Deserialize;
use toml::Spanned;
use xo_proto::policy::position;

use crate::ktls;
use crate::records::Records;
use crate::reload::Loaded;

mod steering;

use self::steering::FileSteering;
pub(crate) use self::steering::{FlowerMode, Steering, SteeringMode};

/// Where the daemon listens for libraries by default.
pub(crate) const DEFAULT_SOCKET: &str = "/run/xo/peerd.sock";
/// Most workers that a pool starts.
const MAX_WORKERS: u32 = 1024;
/// Longest path of a Unix socket, bytes (unix(7), `sun_path` with its NUL).
const MAX_SOCKET_PATH: usize = 107;
/// Where the embedded daemon takes its certificates from.
const DEFAULT_TLS: &str = "/etc/xo";

/// A problem in a configuration or policy file: `FILE:LINE:COLUMN: message`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(String);

impl ConfigError {
    /// From its whole text.
    pub(crate) fn new(text: String) -> ConfigError {
        ConfigError(text)
    }
}

/// The daemon's configuration, checked.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// This machine's name among its peers.
    pub(crate) node: String,
    /// Address for other daemons; a machine that is never a target needs none.
    pub(crate) listen: Option<SocketAddr>,
    /// Unix socket for libraries and `xo-peerd status`.
    pub(crate) socket: PathBuf,
    /// Interfaces to steer; empty: those that hold the addresses in use.
    pub(crate) interfaces: Vec<String>,
    /// Addresses that restored sockets are bound to; one of each family is used.
    pub(crate) addresses: Vec<IpAddr>,
    /// The policy file.
    pub(crate) policy: Option<Loaded>,
    /// Where Prometheus text is served at /metrics.
    pub(crate) metrics: Option<SocketAddr>,
    /// Certificates of the peer channel.
    pub(crate) tls: Option<TlsFiles>,
    /// The peer channel is plain TCP without authentication.
    pub(crate) insecure: bool,
    /// Who does the record layer of connections with TLS for handlers that are programs of their own.
    pub(crate) tls_records: Records,
    /// Users whose processes may use the daemon, besides root and descendants of root's servers.
    pub(crate) users: Vec<u32>,
    /// Who serves the connections that come here.
    pub(crate) handlers: Vec<Handler>,
    /// Time limits of hand-offs.
    pub(crate) handoff: Handoff,
    /// Sizes of the steering tables.
    pub(crate) steering: Steering,
}

/// PEM files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TlsFiles {
    /// The cluster's CA.
    pub(crate) ca: PathBuf,
    /// This node's certificate.
    pub(crate) cert: PathBuf,
    /// Its key.
    pub(crate) key: PathBuf,
}

/// A named way to serve connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handler {
    /// The name that rules use.
    pub(crate) name: String,
    /// How.
    pub(crate) mode: HandlerMode,
}

/// How connections are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum HandlerMode {
    /// By the running server that listens on this port under the library.
    Attach {
        /// The port.
        port: u16,
        /// The server speaks TLS itself there: only connections with TLS are for it.
        tls: bool,
    },
    /// By one process for each connection, the socket on its descriptors 0 and 1.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// By long-lived processes that are passed the sockets.
    Pool {
        /// Program and arguments; empty: operators start the workers.
        command: Vec<String>,
        /// As many are started.
        workers: u32,
        /// Where workers that the daemon has not started connect.
        socket: Option<PathBuf>,
    },
}

/// How hand-offs are made.
#[derive(Clone, Debug)]
pub(crate) struct Handoff {
    /// Which order; see `xo_proto::handoff`.
    pub(crate) order: Order,
    /// From `BEGIN_OFFLOAD` to `TARGET_READY`.
    pub(crate) timeout: Duration,
    /// For a connection to a target that is not connected yet.
    pub(crate) connect_timeout: Duration,
    /// Busy polling after each step of a hand-off (`spin.rs`).
    pub(crate) spin: Duration,
    /// Largest congestion window with which a connection that comes here begins, segments; 0: that of a new connection.
    pub(crate) carry: u16,
}

/// Order of a hand-off's messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Order {
    /// The target starts at once.
    #[default]
    Early,
    /// The target starts when the host has redirected the flow (the paper's).
    Strict,
}

impl Default for Handoff {
    fn default() -> Self {
        Handoff {
            order: Order::default(),
            timeout: Duration::from_millis(100),
            connect_timeout: Duration::from_millis(500),
            spin: Duration::from_micros(250),
            // 6 MB: no client with Linux's own tcp_rmem lets more be on the way.
            carry: 4096,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    node: Spanned<String>,
    listen: Option<SocketAddr>,
    socket: Option<PathBuf>,
    #[serde(default)]
    interfaces: Vec<Spanned<String>>,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    policy: Option<Spanned<PathBuf>>,
    metrics: Option<SocketAddr>,
    tls: Option<Spanned<TlsFiles>>,
    #[serde(default)]
    insecure: bool,
    tls_records: Option<Spanned<Records>>,
    #[serde(default)]
    users: Vec<Spanned<String>>,
    #[serde(default)]
    handler: Vec<Spanned<FileHandler>>,
    #[serde(default)]
    handoff: Order,
    #[serde(default)]
    limits: FileLimits,
    #[serde(default)]
    steering: FileSteering,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileHandler {
    name: Spanned<String>,
    mode: Mode,
    port: Option<Spanned<u16>>,
    command: Option<Spanned<Vec<String>>>,
    workers: Option<Spanned<u32>>,
    socket: Option<Spanned<PathBuf>>,
    tls: Option<Spanned<bool>>,
}

#[derive(Deserialize, Clone, Copy, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Attach,
    Exec,
    Pool,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct FileLimits {
    timeout_ms: Option<u32>,
    connect_timeout_ms: Option<u32>,
    spin_us: Option<u32>,
    carry_cwnd: Option<bool>,
    max_cwnd: Option<NonZeroU16>,
}

impl Config {
    /// Reads and checks a configuration file, and the policy file that it names.
    ///
    /// # Errors
    /// With file, line and column.
    pub(crate) fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = read(path)?;
        let fail = |offset: usize, message: String| {
            let (line, column) = position(&text, offset);
            ConfigError(format!("{}:{line}:{column}: {message}", path.display()))
        };
        let file: File = toml::from_str(&text).map_err(|e| {
            let offset = e.span().map_or(0, |s| s.start);
            fail(offset, e.message().lines().next().unwrap_or("not TOML").to_owned())
        })?;
        let config = file.checked(&fail)?;
        Ok(config)
    }

    /// The configuration of a daemon that a server's library starts: a host, no target.
    #[must_use]
    pub(crate) fn embedded(socket: PathBuf, insecure: bool) -> Config {
        let node = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let tls = TlsFiles::of(Path::new(DEFAULT_TLS), node.trim());
        Config {
            listen: None,
            socket,
            interfaces: Vec::new(),
            addresses: Vec::new(),
            policy: None,
            metrics: None,
            tls: (!insecure).then_some(tls),
            insecure,
            // Nothing is served here but by servers under the library.
            tls_records: Records::Library,
            users: Vec::new(),
            handlers: Vec::new(),
            handoff: Handoff::default(),
            steering: Steering { pin_directory: default_pins(node.trim()), ..Steering::default() },
            node: node.trim().to_owned(),
        }
    }
}

impl TlsFiles {
    /// In a directory as `xo-peerd certs` fills it; a node that has no files of its name has them by the name of `node`.
    fn of(directory: &Path, node: &str) -> TlsFiles {
        let named = directory.join(format!("{node}.pem"));
        let name = if named.exists() { node } else { "node" };
        let file = |end: &str| directory.join(format!("{name}.{end}"));
        TlsFiles { ca: directory.join("ca.pem"), cert: file("pem"), key: file("key") }
    }
}

/// Daemons in several network namespaces share one BPF file system.
fn default_pins(node: &str) -> Option<PathBuf> {
    let namespace = fs::metadata("/proc/self/ns/net").ok()?.ino();
    Some(Path::new("/sys/fs/bpf/xo").join(format!("{node}-{namespace}")))
}

type Fail<'f> = &'f dyn Fn(usize, String) -> ConfigError;

impl File {
    fn checked(self, fail: Fail<'_>) -> Result<Config, ConfigError> {
        if !is_node_name(self.node.get_ref()) {
            let message = format!("node `{}`: letters, digits, `-` and `.` make a name", self.node.get_ref());
            return Err(fail(self.node.span().start, message));
        }
        for name in &self.interfaces {
            if interface_number(name.get_ref()).is_none() {
                return Err(fail(name.span().start, format!("no interface `{}`", name.get_ref())));
            }
        }
        let policy = self.policy.as_ref().map(|policy| check_policy(policy, fail)).transpose()?;
        if self.tls.is_none() && !self.insecure {
            let message = "neither [tls] nor `insecure = true`: peers could not be authenticated";
            return Err(fail(0, message.into()));
        }
        if let Some(tls) = self.tls.as_ref().filter(|_| self.insecure) {
            return Err(fail(tls.span().start, "[tls] has no effect with `insecure = true`".into()));
        }
        let tls_records = self.tls_records.map(|r| records(&r, fail)).transpose()?.unwrap_or_default();
        let socket = self.socket.unwrap_or_else(|| DEFAULT_SOCKET.into());
        let (mut names, mut taken) = (HashSet::new(), vec![socket.clone()]);
        let mut handlers = Vec::new();
        for handler in self.handler {
            let (start, handler) = (handler.span().start, handler.into_inner());
            if handler.name.get_ref().is_empty() {
                return Err(fail(handler.name.span().start, "a handler has a name".into()));
            }
            if !names.insert(handler.name.get_ref().clone()) {
                let message = format!("a second handler `{}`", handler.name.get_ref());
                return Err(fail(handler.name.span().start, message));
            }
            handlers.push(handler.checked(start, &mut taken, fail)?);
        }
        let users = self.users.iter().map(|name| {
            user_id(name.get_ref())
                .ok_or_else(|| fail(name.span().start, format!("no user `{}`", name.get_ref())))
        });
        let node = self.node.into_inner();
        let steering = self.steering.checked(&node, fail)?;
        Ok(Config {
            users: users.collect::<Result<_, _>>()?,
            node,
            listen: self.listen,
            socket,
            interfaces: self.interfaces.into_iter().map(Spanned::into_inner).collect(),
            addresses: self.addresses,
            policy,
            metrics: self.metrics,
            tls: self.tls.map(Spanned::into_inner),
            insecure: self.insecure,
            tls_records,
            handlers,
            handoff: self.limits.checked(self.handoff),
            steering,
        })
    }
}

impl FileHandler {
    /// `taken`: sockets that the file has named before, this handler's is added.
    fn checked(self, start: usize, taken: &mut Vec<PathBuf>, fail: Fail<'_>) -> Result<Handler, ConfigError> {
        let (name, allowed): (_, &[&str]) = match self.mode {
            Mode::Attach => ("attach", &["port", "tls"]),
            Mode::Exec => ("exec", &["command"]),
            Mode::Pool => ("pool", &["command", "workers", "socket"]),
        };
        let given = [
            ("port", self.port.as_ref().map(Spanned::span)),
            ("command", self.command.as_ref().map(Spanned::span)),
            ("workers", self.workers.as_ref().map(Spanned::span)),
            ("socket", self.socket.as_ref().map(Spanned::span)),
            ("tls", self.tls.as_ref().map(Spanned::span)),
        ];
        for (key, at) in given {
            if let Some(at) = at.filter(|_| !allowed.contains(&key)) {
                return Err(fail(at.start, format!("mode `{name}` has no `{key}`")));
            }
        }
        let command = self.command.map(|c| program(c, fail)).transpose()?;
        let mode = match (self.mode, self.port.map(Spanned::into_inner), command) {
            (Mode::Attach, Some(port), _) if port != 0 => {
                HandlerMode::Attach { port, tls: self.tls.is_some_and(Spanned::into_inner) }
            }
            (Mode::Attach, ..) => return Err(fail(start, "mode `attach` needs a `port`".into())),
            (Mode::Exec, _, Some(command)) => HandlerMode::Exec { command },
            (Mode::Exec, ..) => return Err(fail(start, "mode `exec` needs a `command`".into())),
            (Mode::Pool, _, None) if self.socket.is_none() => {
                return Err(fail(start, "mode `pool` needs a `command`, or a `socket`".into()));
            }
            (Mode::Pool, _, command) => {
                let workers = workers(self.workers, command.is_some(), fail)?;
                let socket = self.socket.map(|s| unix_socket(s, taken, fail)).transpose()?;
                HandlerMode::Pool { command: command.unwrap_or_default(), workers, socket }
            }
        };
        Ok(Handler { name: self.name.into_inner(), mode })
    }
}

fn program(command: Spanned<Vec<String>>, fail: Fail<'_>) -> Result<Vec<String>, ConfigError> {
    let at = command.span().start;
    let command = command.into_inner();
    if !command.first().is_some_and(|p| is_program(Path::new(p))) {
        return Err(fail(at, "`command` begins with the absolute path of a program".into()));
    }
    Ok(command)
}

/// How many workers a pool starts.
fn workers(said: Option<Spanned<u32>>, has_command: bool, fail: Fail<'_>) -> Result<u32, ConfigError> {
    let Some(said) = said else { return Ok(u32::from(has_command)) };
    if !has_command {
        return Err(fail(said.span().start, "`workers` without a `command` to start them by".into()));
    }
    if !(1..=MAX_WORKERS).contains(said.get_ref()) {
        return Err(fail(said.span().start, format!("`workers` is 1 to {MAX_WORKERS}")));
    }
    Ok(said.into_inner())
}

/// The path of a socket that nothing else in the file has.
fn unix_socket(
    path: Spanned<PathBuf>,
    taken: &mut Vec<PathBuf>,
    fail: Fail<'_>,
) -> Result<PathBuf, ConfigError> {
    let at = path.span().start;
    let path = path.into_inner();
    if !path.is_absolute() || path.as_os_str().len() > MAX_SOCKET_PATH {
        let message = format!("`socket` is an absolute path of at most {MAX_SOCKET_PATH} bytes");
        return Err(fail(at, message));
    }
    if taken.contains(&path) {
        return Err(fail(at, format!("a second socket {}", path.display())));
    }
    taken.push(path.clone());
    Ok(path)
}

impl FileLimits {
    fn checked(self, order: Order) -> Handoff {
        let default = Handoff::default();
        let ms = |n: Option<u32>, d| n.map_or(d, |n| Duration::from_millis(n.into()));
        Handoff {
            order,
            timeout: ms(self.timeout_ms, default.timeout),
            connect_timeout: ms(self.connect_timeout_ms, default.connect_timeout),
            spin: self.spin_us.map_or(default.spin, |n| Duration::from_micros(n.into())),
            carry: if self.carry_cwnd == Some(false) {
                0
            } else {
                self.max_cwnd.map_or(default.carry, Into::into)
            },
        }
    }
}

/// Who cannot be had is an error.
fn records(said: &Spanned<Records>, fail: Fail<'_>) -> Result<Records, ConfigError> {
    if *said.get_ref() == Records::Kernel {
        ktls::available().map_err(|why| fail(said.span().start, format!("tls_records `kernel`: {why}")))?;
    }
    Ok(*said.get_ref())
}

/// The error has the policy file's own position.
fn check_policy(path: &Spanned<PathBuf>, fail: Fail<'_>) -> Result<Loaded, ConfigError> {
    if let Err(e) = fs::metadata(path.get_ref()) {
        return Err(fail(path.span().start, format!("policy {}: {e}", path.get_ref().display())));
    }
    Loaded::read(path.get_ref())
}

fn read(path: &Path) -> Result<String, ConfigError> {
    fs::read_to_string(path).map_err(|e: io::Error| ConfigError(format!("{}: {e}", path.display())))
}

/// A DNS name, since certificates carry it as one.
fn is_node_name(name: &str) -> bool {
    let label = |l: &str| !l.is_empty() && l.len() <= 63 && !l.starts_with('-') && !l.ends_with('-');
    name.len() <= 253
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.')
        && name.split('.').all(label)
}

/// Number of an interface. Asks the kernel: /sys may be that of another network namespace.
pub(crate) fn interface_number(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: a C string, which is only read.
    let number = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (number != 0).then_some(number)
}

fn is_program(path: &Path) -> bool {
    let executable = |m: fs::Metadata| m.is_file() && m.permissions().mode() & 0o111 != 0;
    path.is_absolute() && fs::metadata(path).is_ok_and(executable)
}

fn user_id(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: a C string; the result is read at once, and only one thread runs at this time.
    unsafe { libc::getpwnam(name.as_ptr()).as_ref().map(|user| user.pw_uid) }
}

#[cfg(test)]
mod tests;
