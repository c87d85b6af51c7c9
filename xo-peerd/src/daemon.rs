//! Puts the daemon together: interfaces, steering, sockets, then the event loop.

use std::error::Error;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mio::Poll;
use mio::net::TcpListener;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use socket2::Socket;
use xo_proto::wire::{Hello, MAGIC, VERSION};
use xo_sys::replay::RawSender;
use xo_sys::sock_diag::TcpLookup;
use xo_sys::{fdpass, probe};

use crate::config::{Config, SteeringMode};
use crate::engine::{Engine, Parts};
use crate::flower::Flower;
use crate::links;
use crate::metrics::Metrics;
use crate::metrics_http::{self, Published};
use crate::pool::Pools;
use crate::state::State;
use crate::steer::Steer;
use crate::steer::pin::{Pins, Sizes};
use crate::targets::Targets;
use crate::tls::Tls;

/// Everyone may connect to the socket; who may use it is decided by peer credentials and tickets.
const SOCKET_MODE: u32 = 0o666;
/// Smallest MTU that replayed packets are cut to when an interface's cannot be read, bytes.
const DEFAULT_MTU: usize = 1500;

/// How the daemon was started.
pub(crate) struct RunOptions {
    /// Started by the library of a server: ends when nobody is left to serve.
    pub(crate) embedded: bool,
    /// Written to and closed when the socket answers.
    pub(crate) ready_fd: Option<RawFd>,
}

/// Runs the daemon until it is told to stop.
///
/// # Errors
/// Whatever keeps it from starting: missing privileges, an address in use, unusable certificates ...
pub(crate) fn run(mut config: Config, options: &RunOptions) -> Result<(), Box<dyn Error>> {
    let tls = match &config.tls {
        Some(files) if !config.insecure => {
            let tls = Tls::load(files)?;
            // An embedded daemon's node name is the host name; its certificate says who it is to peers.
            tls.check_node(&config.node)?;
            Some(tls)
        }
        _ => None,
    };
    if config.insecure {
        log::warn!("insecure = true: peers are neither authenticated nor encrypted");
    }
    let mtu = complete_addresses(&mut config)?;
    let features = probe::Features::detect();
    let _lock = lock(&config.socket)?;
    let wanted = Sizes { flows: config.steering.max_flows, ring: config.steering.hold_bytes };
    let pins = config.steering.pin_directory.as_ref().and_then(|directory| {
        let opened = Pins::open(directory, wanted);
        opened
            .inspect_err(|e| {
                log::warn!("{}: {e}: connections will end with this daemon", directory.display())
            })
            .ok()
    });
    let mut steer = Steer::load(&config.interfaces, wanted, pins)?;
    match config.steering.mode {
        SteeringMode::Tc => steer.detach_xdp(),
        SteeringMode::Xdp => steer.attach_xdp(&config.interfaces),
    }
    if config.handoff.carry > 0
        && let Err(e) = steer.carry_windows()
    {
        log::warn!("{e}: connections that come here begin with the window of a new one");
        config.handoff.carry = 0;
    }
    let flower = Flower::open(&config, &mut steer);
    // Servers that find a socket wait for its answer, so it is there when all else is.
    let ipc_listener = listen_local(&config)?;
    let socket = config.socket.clone();
    let peer_listener = config
        .listen
        .map(|a| TcpListener::bind(a).map_err(|e| format!("listen = \"{a}\": {e}")))
        .transpose()?;
    let published = Published::default();
    if let Some(address) = config.metrics {
        metrics_http::serve(address, Arc::clone(&published))
            .map_err(|e| format!("metrics = \"{address}\": {e}"))?;
    }
    let hello = Hello {
        magic: MAGIC,
        version: VERSION,
        node: config.node.clone(),
        boot_id: probe::boot_id()?,
        usec_timestamps: features.usec_timestamps,
    };
    let mut random = [0_u8; 20];
    fill_random(&mut random)?;
    let (ticket, epoch) = split_random(random);
    let state = State::load(&socket, ticket).map_err(|e| format!("state of {}: {e}", socket.display()))?;
    log::info!(
        "xo-peerd {} on {}: socket {}, peers {}, interfaces {} ({}), addresses {:?}",
        env!("CARGO_PKG_VERSION"),
        config.node,
        socket.display(),
        config.listen.map_or_else(|| "none".into(), |a| a.to_string()),
        config.interfaces.join(", "),
        steer.mode(),
        config.addresses,
    );
    let parts = Parts {
        embedded: options.embedded,
        poll: Poll::new()?,
        metrics: Metrics::new(),
        published,
        steer,
        flower,
        raw: RawSender::new().map_err(|e| format!("raw socket for held packets (CAP_NET_RAW): {e}"))?,
        diag: TcpLookup::new()?,
        tls,
        hello,
        state,
        pools: Pools::open(&config)?,
        targets: Targets::new().map_err(|e| format!("the board: {e}"))?,
        // Numbers of an earlier life of this daemon must not be met again.
        first_id: u64::from(epoch) << 32,
        mtu,
        ipc_listener,
        peer_listener,
        signals: signals(&[SIGTERM, SIGINT])?,
        hangups: signals(&[SIGHUP])?,
        children: signals(&[SIGCHLD])?,
        config,
    };
    let mut engine = Engine::new(parts)?;
    if let Some(fd) = options.ready_fd {
        // SAFETY: the starter passes a descriptor for this purpose; nobody else uses it.
        let mut pipe = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        pipe.write_all(b"1")?;
    }
    let result = engine.run();
    let _ = fs::remove_file(&socket);
    Ok(result?)
}

/// Fills in the interfaces and addresses that the configuration leaves open; returns the smallest MTU.
fn complete_addresses(config: &mut Config) -> Result<usize, Box<dyn Error>> {
    let all = links::addresses()?;
    let own = config.listen.map(|a| a.ip()).filter(|ip| !ip.is_unspecified());
    if config.interfaces.is_empty() {
        for address in all.iter().filter(|a| own.is_none_or(|ip| ip == a.ip)) {
            if !config.interfaces.contains(&address.interface) {
                config.interfaces.push(address.interface.clone());
            }
        }
    }
    if config.interfaces.is_empty() {
        return Err("no interface to steer: none that is up holds the addresses in use".into());
    }
    let steered = || all.iter().filter(|a| config.interfaces.contains(&a.interface));
    let mtu = steered().map(|a| a.mtu).min().unwrap_or(DEFAULT_MTU);
    let found: Vec<IpAddr> = own.into_iter().chain(steered().map(|a| a.ip)).collect();
    for v4 in [true, false] {
        let fits = |ip: &&IpAddr| ip.is_ipv4() == v4;
        if config.addresses.iter().find(fits).is_none() {
            config.addresses.extend(found.iter().find(fits));
        }
    }
    Ok(mtu)
}

/// One daemon at a time: whoever has the lock has the pinned maps. It goes with the process.
fn lock(socket: &Path) -> Result<File, Box<dyn Error>> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    }
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|e| format!("{}: {e}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(format!("another xo-peerd runs on socket {}", socket.display()).into())
        }
        Err(TryLockError::Error(e)) => Err(format!("{}: {e}", path.display()).into()),
    }
}

fn listen_local(config: &Config) -> Result<Socket, Box<dyn Error>> {
    let fd = fdpass::listen(&config.socket, SOCKET_MODE)
        .map_err(|e| format!("socket {}: {e}", config.socket.display()))?;
    let socket = Socket::from(OwnedFd::from(fd));
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn signals(which: &[i32]) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    for signal in which {
        signal_hook::low_level::pipe::register(*signal, theirs.try_clone()?)?;
    }
    Ok(ours)
}

fn fill_random(buffer: &mut [u8]) -> io::Result<()> {
    // SAFETY: pointer and length describe `buffer`.
    let n = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if n == buffer.len() as isize { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn split_random(random: [u8; 20]) -> ([u8; 16], u32) {
    let mut ticket = [0; 16];
    ticket.copy_from_slice(&random[..16]);
    (ticket, u32::from_le_bytes([random[16], random[17], random[18], random[19]]))
}
