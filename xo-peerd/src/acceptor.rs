//! Handler mode `attach`: a restored connection comes out of the accept of a process that listens under the
//! library.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Child;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use slab::Slab;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use xo_proto::frame::{MAX_LOCAL_MESSAGE, decode_local};
use xo_proto::ipc::{Deliver, FromDaemon};
use xo_proto::slot::{DELIVERY_CLOSED, WAKE_PORTS};
use xo_sys::fdpass;
use xo_sys::slots::SlotTable;
use zeroize::Zeroize;

use crate::engine::{Engine, ServedKey};
use crate::ipc::{self, Library};
use crate::timers::Timer;

/// How long a woken server may take to accept.
const TAKE_PATIENCE: Duration = Duration::from_secs(5);

/// A process that accepts from a listening socket.
pub(crate) struct Acceptor {
    library: usize,
    serial: u64,
    address: SocketAddr,
    v6only: bool,
    /// It can serve connections that come with TLS.
    tls: bool,
    /// How it is given connections; `None`: woken by a loopback connection.
    channel: Option<Channel>,
}

/// A socket pair whose other end is in the process's epoll.
pub(crate) struct Channel {
    ours: OwnedFd,
    /// A duplicate of the process's end: what it has not taken when it goes is taken out here.
    theirs: OwnedFd,
    /// What the pair had no room for.
    outbox: VecDeque<(Deliver, OwnedFd)>,
}

impl Channel {
    /// From the descriptors of a registration.
    pub(crate) fn new(ours: OwnedFd, theirs: OwnedFd) -> Channel {
        Channel { ours, theirs, outbox: VecDeque::new() }
    }

    /// Sends what there is room for.
    fn flush(&mut self) -> io::Result<()> {
        while let Some((deliver, fd)) = self.outbox.front() {
            let message = FromDaemon::Deliver(deliver.clone());
            match ipc::send(self.ours.as_raw_fd(), &message, &[fd.as_raw_fd()]) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                other => other?,
            }
            self.outbox.pop_front();
        }
        Ok(())
    }

    /// What the process has not accepted.
    fn left_over(&mut self) -> Vec<(Deliver, OwnedFd)> {
        let mut all = Vec::new();
        let mut buffer = [0; MAX_LOCAL_MESSAGE];
        while let Ok((n @ 1.., [Some(fd), ..])) =
            fdpass::recv(self.theirs.as_raw_fd(), &mut buffer, libc::MSG_DONTWAIT)
        {
            if let Ok(FromDaemon::Deliver(deliver)) = decode_local(&buffer[..n]) {
                all.push((deliver, OwnedFd::from(fd)));
            }
            buffer[..n].zeroize();
        }
        all.extend(self.outbox.drain(..));
        all
    }
}

/// A restored connection that waits for a wake-up connection to be accepted.
pub(crate) struct Waiting {
    key: ServedKey,
    socket: OwnedFd,
    client: SocketAddr,
    port: u16,
    /// Keeps the wake-up connection open until it is taken.
    _wake: Socket,
    tables: Vec<Rc<SlotTable>>,
}

/// A restored connection whose wake-up waits until one of [`WAKE_PORTS`] is free.
pub(crate) struct WakeLater {
    key: ServedKey,
    listening: SocketAddr,
    client: SocketAddr,
    socket: OwnedFd,
}

/// Where a served connection is.
pub(crate) enum Place {
    /// Nowhere yet, or not any more.
    None,
    /// In a process under the library.
    Process {
        /// Index and serial of its library connection.
        library: (usize, u64),
        /// Its delivery slot there.
        delivery: u32,
    },
    /// In a handler process of its own.
    Child(Box<Child>),
}

impl Place {
    /// The handler has closed the connection, or is gone.
    pub(crate) fn closed(&self, libraries: &Slab<Library>) -> bool {
        match self {
            Place::Process { library: (index, serial), delivery } => libraries
                .get(*index)
                .filter(|l| l.serial == *serial)
                .and_then(|l| l.slots.as_ref())
                .is_none_or(|slots| slots.delivery(*delivery) == DELIVERY_CLOSED),
            Place::None | Place::Child(_) => false,
        }
    }

    /// Gives the delivery slot back.
    pub(crate) fn free(self, libraries: &mut Slab<Library>) {
        if let Place::Process { library: (index, serial), delivery } = self
            && let Some(library) = libraries.get_mut(index).filter(|l| l.serial == serial)
        {
            library.free_delivery(delivery);
        }
    }
}

impl Engine {
    /// A process says that it accepts from this listening socket; the descriptor proves it.
    pub(crate) fn register(
        &mut self,
        index: usize,
        socket: &OwnedFd,
        channel: Option<Channel>,
        tls: bool,
    ) -> Result<(), String> {
        let (address, v6only) = listening(socket).map_err(|e| format!("not a listening socket: {e}"))?;
        let Some(library) = self.libraries.get(index) else { return Ok(()) };
        log::debug!(
            "process {} accepts on {address}, {}",
            library.pid,
            if channel.is_some() { "by a channel" } else { "woken" }
        );
        if channel.is_some() {
            // Until its epoll held its first connection, the process had to be woken.
            let woken = |a: &Acceptor| a.channel.is_none() && a.library == index && a.address == address;
            self.acceptors.retain(|_, a| !woken(a));
        }
        let Some(library) = self.libraries.get(index) else { return Ok(()) };
        let fd = channel.as_ref().map(|c| c.ours.as_raw_fd());
        let acceptor = Acceptor { library: index, serial: library.serial, address, v6only, tls, channel };
        let number = self.acceptors.insert(acceptor);
        if let Some(fd) = fd
            && let Err(e) = self.watch_acceptor(number, fd)
        {
            self.acceptors.remove(number);
            return Err(format!("watching a channel: {e}"));
        }
        if self.acceptors_on(address.port()) == 1 {
            // Those that it was reported to have nobody for may send connections again.
            self.report(Instant::now());
        }
        Ok(())
    }

    /// The next process in turn that can accept a connection of this client on this port, with TLS (and begin with a handshake, as
    /// it does on a port with TLS) or without: its number and the address it listens on.
    pub(crate) fn pick_acceptor(
        &mut self,
        port: u16,
        client: SocketAddr,
        tls: [bool; 2],
    ) -> Option<(usize, SocketAddr)> {
        let [comes_with, handshake] = tls;
        let can = |a: &Acceptor| (a.tls || !comes_with) && (!handshake || self.answers(a));
        let native = |a: &Acceptor| a.address.is_ipv4() == client.is_ipv4();
        let dual = |a: &Acceptor| a.address.is_ipv6() && !a.v6only && client.is_ipv4();
        let turn = self.next_acceptor;
        let next = |fits: &dyn Fn(&Acceptor) -> bool| {
            let mut all =
                self.acceptors.iter().filter(|(_, a)| a.address.port() == port && fits(a) && can(a));
            let first = all.clone().next();
            all.find(|(i, _)| *i >= turn).or(first).map(|(i, a)| (i, a.address))
        };
        let (number, address) = next(&native).or_else(|| next(&dual))?;
        self.next_acceptor = number + 1;
        Some((number, address))
    }

    /// How many listening sockets on a port take restored connections.
    pub(crate) fn acceptors_on(&self, port: u16) -> u64 {
        self.acceptors.iter().filter(|(_, a)| a.address.port() == port).count() as u64
    }

    /// How those on a port, which has TLS itself or not, serve connections that come with TLS.
    pub(crate) fn tls_on(&self, port: u16, handshake: bool) -> &'static str {
        let mut all = self.acceptors.iter().filter(|(_, a)| a.address.port() == port);
        if all.any(|(_, a)| a.tls && (!handshake || self.answers(a))) { "library" } else { "no" }
    }

    /// Can its server, which has TLS itself, be answered for by the library?
    fn answers(&self, acceptor: &Acceptor) -> bool {
        let slots = self.libraries.get(acceptor.library).and_then(|l| l.slots.as_ref());
        slots.is_some_and(|slots| slots.answers_for_tls())
    }

    /// Gives a live connection to the process it was restored for, or to another that listens there.
    pub(crate) fn attach(
        &mut self,
        key: &ServedKey,
        port: u16,
        picked: Option<usize>,
        client: SocketAddr,
        socket: OwnedFd,
    ) -> io::Result<()> {
        let served = self.served.get(key);
        let tls = served.map_or([false; 2], |s| [s.tls.is_some(), s.handshake]);
        let still = picked.filter(|n| self.acceptors.get(*n).is_some_and(|a| a.address.port() == port));
        let number = still
            .or_else(|| self.pick_acceptor(port, client, tls).map(|(number, _)| number))
            .ok_or_else(|| io::Error::other(format!("no process listens on port {port} any more")))?;
        let acceptor = &mut self.acceptors[number];
        let Some(channel) = &mut acceptor.channel else {
            let address = acceptor.address;
            return self.wake(key, address, client, socket);
        };
        let Some(served) = self.served.get_mut(key) else { return Ok(()) };
        served.place = give(&mut self.libraries, acceptor.library, |delivery| {
            channel.outbox.push_back((served.deliver(delivery), socket));
            Ok(())
        })?;
        // If it has hung up at this moment, what is in the outbox goes to another.
        self.acceptor_ready(number, false);
        Ok(())
    }

    /// An acceptor's channel has room again, or has ended.
    pub(crate) fn acceptor_ready(&mut self, number: usize, ended: bool) {
        let channel = self.acceptors.get_mut(number).and_then(|a| a.channel.as_mut());
        let broken = channel.is_some_and(|c| c.flush().is_err());
        if ended || broken {
            self.acceptor_gone(number);
        }
    }

    /// A process does not accept from a listening socket any more: what it has not taken goes to others.
    fn acceptor_gone(&mut self, number: usize) {
        let Some(mut acceptor) = self.acceptors.try_remove(number) else { return };
        let Some(channel) = &mut acceptor.channel else { return };
        let _ = self.poll.registry().deregister(&mut SourceFd(&channel.ours.as_raw_fd()));
        for (deliver, socket) in channel.left_over() {
            let is_it = |p: &Place| {
                matches!(p, Place::Process { library, delivery }
                    if *library == (acceptor.library, acceptor.serial) && *delivery == deliver.delivery)
            };
            let Some(key) = self.served.iter().find(|(_, s)| is_it(&s.place)).map(|(k, _)| k.clone()) else {
                continue;
            };
            let client = deliver.client;
            if let Some(served) = self.served.get_mut(&key) {
                std::mem::replace(&mut served.place, Place::None).free(&mut self.libraries);
                served.tls = deliver.tls;
            }
            if let Err(e) = self.attach(&key, acceptor.address.port(), None, client, socket) {
                log::warn!("the connection of {client} ends: {e}");
                self.expect_end(&key);
            }
        }
    }

    /// Wakes a server that does not use epoll: a connection to its listening socket, which its accept hook
    /// swaps for the restored one.
    fn wake(
        &mut self,
        key: &ServedKey,
        listening: SocketAddr,
        client: SocketAddr,
        socket: OwnedFd,
    ) -> io::Result<()> {
        let ip = match listening.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        if self.waiting.len() >= WAKE_PORTS {
            let later = WakeLater { key: key.clone(), listening, client, socket };
            self.wake_later.push_back(later);
            return Ok(());
        }
        let wake = Socket::new(Domain::for_address(listening), Type::STREAM, None)?;
        wake.set_nonblocking(true)?;
        wake.bind(&SockAddr::from(SocketAddr::new(ip, 0)))?;
        let wake_port = local_address(&wake)?.port();
        let port = listening.port();
        let tables: Vec<_> = self
            .acceptors
            .iter()
            .filter(|(_, a)| a.address.port() == port)
            .filter_map(|(_, a)| self.libraries.get(a.library)?.slots.clone())
            .collect();
        for table in &tables {
            table.add_wake_port(wake_port);
        }
        match wake.connect(&SockAddr::from(SocketAddr::new(ip, port))) {
            Err(e) if e.raw_os_error() != Some(libc::EINPROGRESS) => {
                // Nobody listens any more.
                tables.iter().for_each(|t| t.remove_wake_port(wake_port));
                return Err(e);
            }
            _ => {}
        }
        // Over loopback the handshake is over by now. A socket with TCP_DEFER_ACCEPT (Apache's) waits for data.
        if let Err(e) = wake.send(b"\n") {
            log::debug!("wake-up of port {port}: {e}");
        }
        let waiting = Waiting { key: key.clone(), socket, client, port, _wake: wake, tables };
        self.waiting.insert(wake_port, waiting);
        self.at(Instant::now() + TAKE_PATIENCE, Timer::Waiting(wake_port));
        Ok(())
    }

    /// Wakes for connections that waited for a free wake-up port.
    fn wake_next(&mut self) {
        while self.waiting.len() < WAKE_PORTS
            && let Some(WakeLater { key, listening, client, socket }) = self.wake_later.pop_front()
        {
            if let Err(e) = self.wake(&key, listening, client, socket) {
                log::warn!("port {}: the connection of {client} ends: {e}", listening.port());
                self.expect_end(&key);
            }
        }
    }

    /// A process has accepted a wake-up connection.
    pub(crate) fn take(&mut self, index: usize, wake_port: u16) -> Result<(), String> {
        let library = self.libraries.get(index).ok_or("gone")?;
        let Some(waiting) = self.waiting.remove(&wake_port) else {
            return library.send(&FromDaemon::Nothing, &[]).map_err(|e| e.to_string());
        };
        for table in &waiting.tables {
            table.remove_wake_port(wake_port);
        }
        let taken = self.hand_out(index, waiting);
        self.wake_next();
        taken.map_err(|e| e.to_string())
    }

    /// Answers a process that accepted a wake-up connection with the connection that it was for.
    fn hand_out(&mut self, index: usize, waiting: Waiting) -> io::Result<()> {
        let fd = self.libraries.get(index).ok_or(ErrorKind::NotFound)?.fd();
        let Some(served) = self.served.get_mut(&waiting.key) else { return Ok(()) };
        served.place = give(&mut self.libraries, index, |delivery| {
            let message = FromDaemon::Deliver(served.deliver(delivery));
            ipc::send(fd, &message, &[waiting.socket.as_raw_fd()])
        })?;
        Ok(())
    }

    /// Nobody accepted the wake-up: the connection is closed with it.
    pub(crate) fn waiting_deadline(&mut self, wake_port: u16) {
        if let Some(waiting) = self.waiting.remove(&wake_port) {
            for table in &waiting.tables {
                table.remove_wake_port(wake_port);
            }
            log::warn!("port {} does not accept: the connection of {} ends", waiting.port, waiting.client);
            drop(waiting.socket);
            self.expect_end(&waiting.key);
            self.wake_next();
        }
    }

    /// A process under the library is gone, and with it the connections it served.
    pub(crate) fn forget_process(&mut self, index: usize, serial: u64) {
        let its: Vec<_> = self.acceptors.iter().filter(|(_, a)| a.library == index).map(|(n, _)| n).collect();
        for number in its {
            self.acceptor_gone(number);
        }
        let had = |p: &Place| matches!(p, Place::Process { library, .. } if *library == (index, serial));
        let keys: Vec<_> =
            self.served.iter().filter(|(_, s)| had(&s.place)).map(|(k, _)| k.clone()).collect();
        for key in keys {
            self.expect_end(&key);
        }
    }
}

/// Takes a delivery slot of a process and sends it something in it.
fn give(
    libraries: &mut Slab<Library>,
    index: usize,
    send: impl FnOnce(u32) -> io::Result<()>,
) -> io::Result<Place> {
    let library = libraries.get_mut(index).ok_or(ErrorKind::NotFound)?;
    let full = || io::Error::new(ErrorKind::StorageFull, "its delivery table is full");
    let delivery = library.take_delivery().ok_or_else(full)?;
    if let Some(slots) = &library.slots {
        slots.open_delivery(delivery);
    }
    match send(delivery) {
        Ok(()) => Ok(Place::Process { library: (index, library.serial), delivery }),
        Err(e) => {
            library.free_delivery(delivery);
            Err(e)
        }
    }
}

/// Address of a listening TCP socket, and whether it takes IPv6 only.
fn listening(socket: &OwnedFd) -> io::Result<(SocketAddr, bool)> {
    let socket = SockRef::from(socket);
    if !socket.is_listener()? {
        return Err(ErrorKind::InvalidInput.into());
    }
    let address = local_address(&socket)?;
    Ok((address, address.is_ipv6() && socket.only_v6()?))
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| ErrorKind::InvalidInput.into())
}
