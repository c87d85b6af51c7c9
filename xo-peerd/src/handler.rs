//! Who gets a restored connection: a process that listens under the library (`attach`) or a new process
//! (`exec`).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Sender, channel};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_queue::ArrayQueue;
use mio::Waker;
use slab::Slab;
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use xo_proto::handoff::TargetEvent;
use xo_proto::ipc::{Deliver, FromDaemon};
use xo_proto::reason::Reason;
use xo_proto::slot::{DELIVERY_CLOSED, WAKE_PORTS};
use xo_sys::slots::SlotTable;

use crate::engine::{Engine, ServedKey, Timer};
use crate::ipc::Library;

/// How long a woken server may take to accept.
const TAKE_PATIENCE: Duration = Duration::from_secs(5);
/// Handler processes being started at one time.
const SPAWN_QUEUE: usize = 1024;

/// A process that accepts from a listening socket.
pub(crate) struct Acceptor {
    library: usize,
    serial: u64,
    address: SocketAddr,
    v6only: bool,
    epoll: bool,
}

/// A restored connection that waits for a wake-up connection to be accepted.
pub(crate) struct Waiting {
    key: ServedKey,
    socket: OwnedFd,
    deliver: Deliver,
    /// Keeps the wake-up connection open until it is taken.
    _wake: Socket,
    tables: Vec<Rc<SlotTable>>,
}

/// Where a served connection is.
pub(crate) enum Place {
    /// Nowhere yet, or not any more.
    None,
    /// In a process under the library.
    Process {
        /// Index and serial of its library connection.
        library: (usize, u64),
        /// Delivery slot there, once used.
        delivery: Option<u32>,
    },
    /// In a handler process of its own.
    Child(Box<Child>),
}

impl Place {
    /// The handler has closed the connection, or is gone.
    pub(crate) fn closed(&self, libraries: &Slab<Library>) -> bool {
        match self {
            Place::Process { library: (index, serial), delivery: Some(delivery) } => libraries
                .get(*index)
                .filter(|l| l.serial == *serial)
                .and_then(|l| l.slots.as_ref())
                .is_none_or(|slots| slots.delivery(*delivery) == DELIVERY_CLOSED),
            Place::Process { .. } | Place::None | Place::Child(_) => false,
        }
    }

    /// Gives the delivery slot back.
    pub(crate) fn free(self, libraries: &mut Slab<Library>) {
        if let Place::Process { library: (index, serial), delivery: Some(delivery) } = self
            && let Some(library) = libraries.get_mut(index).filter(|l| l.serial == serial)
        {
            library.free_delivery(delivery);
        }
    }
}

impl Engine {
    /// A process says that it accepts from this listening socket; the descriptor proves it.
    pub(crate) fn register(&mut self, index: usize, epoll: bool, socket: &OwnedFd) -> Result<(), String> {
        let (address, v6only) = listening(socket).map_err(|e| format!("not a listening socket: {e}"))?;
        let Some(library) = self.libraries.get(index) else { return Ok(()) };
        let acceptor = Acceptor {
            library: index,
            serial: library.serial,
            address,
            v6only,
            epoll,
        };
        log::debug!("process {} accepts on {}", library.pid, address);
        self.acceptors.retain(|a| (a.library, a.address) != (index, address));
        self.acceptors.push(acceptor);
        Ok(())
    }

    /// The next process in turn that can accept a connection of this client on this port.
    pub(crate) fn pick_acceptor(&mut self, port: u16, client: SocketAddr) -> Option<(Place, SocketAddr)> {
        let native = |a: &Acceptor| a.address.is_ipv4() == client.is_ipv4();
        let dual = |a: &Acceptor| a.address.is_ipv6() && !a.v6only && client.is_ipv4();
        let n = self.acceptors.len();
        let turn = self.next_acceptor;
        let order = || (0..n).map(|i| (turn + i) % n);
        let fits = |i: &usize, f: &dyn Fn(&Acceptor) -> bool| {
            self.acceptors.get(*i).is_some_and(|a| a.address.port() == port && f(a))
        };
        let found = order().find(|i| fits(i, &native)).or_else(|| order().find(|i| fits(i, &dual)))?;
        self.next_acceptor = found + 1;
        let acceptor = self.acceptors.get(found)?;
        let place = Place::Process { library: (acceptor.library, acceptor.serial), delivery: None };
        Some((place, acceptor.address))
    }

    /// Gives a live connection to the process it was restored for, or to another that listens there.
    pub(crate) fn attach(
        &mut self,
        key: &ServedKey,
        port: u16,
        place: Option<Place>,
        client: SocketAddr,
        socket: OwnedFd,
    ) -> io::Result<()> {
        let gone = || io::Error::other(format!("no process listens on port {port} any more"));
        let (index, serial) = match place {
            Some(Place::Process { library: (index, serial), .. })
                if self.libraries.get(index).is_some_and(|l| l.serial == serial) =>
            {
                (index, serial)
            }
            _ => match self.pick_acceptor(port, client) {
                Some((Place::Process { library, .. }, _)) => library,
                _ => return Err(gone()),
            },
        };
        let acceptor = self.acceptors.iter().find(|a| a.library == index && a.address.port() == port);
        let (epoll, address) = acceptor.map(|a| (a.epoll, a.address)).ok_or_else(gone)?;
        let library = self.libraries.get_mut(index).ok_or_else(gone)?;
        let delivery = library.take_delivery().ok_or_else(|| io::Error::other("its delivery table is full"))?;
        let deliver = Deliver { delivery, client, listen_port: port };
        let place = Place::Process { library: (index, serial), delivery: Some(delivery) };
        if let Some(slots) = &library.slots {
            slots.open_delivery(delivery);
        }
        if epoll {
            if let Err(e) = library.deliver(deliver, socket) {
                library.free_delivery(delivery);
                return Err(e);
            }
        } else {
            // The process that accepts the wake-up brings its own delivery slot.
            library.free_delivery(delivery);
            return self.wake(key, address, deliver, socket);
        }
        if let Some(served) = self.served.get_mut(key) {
            served.place = place;
        }
        Ok(())
    }

    /// Wakes a server that does not use epoll: a connection to its listening socket, which its accept hook
    /// swaps for the restored one.
    fn wake(
        &mut self,
        key: &ServedKey,
        listening: SocketAddr,
        deliver: Deliver,
        socket: OwnedFd,
    ) -> io::Result<()> {
        let ip = match listening.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            ip => ip,
        };
        if self.waiting.len() >= WAKE_PORTS {
            return Err(io::Error::other("too many wake-ups under way"));
        }
        let wake = Socket::new(Domain::for_address(listening), Type::STREAM, None)?;
        wake.bind(&SockAddr::from(SocketAddr::new(ip, 0)))?;
        let port = local_address(&wake)?.port();
        let tables: Vec<_> = self
            .acceptors
            .iter()
            .filter(|a| a.address.port() == listening.port())
            .filter_map(|a| self.libraries.get(a.library)?.slots.clone())
            .collect();
        for table in &tables {
            table.add_wake_port(port);
        }
        wake.set_nonblocking(true)?;
        match wake.connect(&SockAddr::from(SocketAddr::new(ip, listening.port()))) {
            Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
            other => other?,
        }
        let waiting = Waiting { key: key.clone(), socket, deliver, _wake: wake, tables };
        self.waiting.insert(port, waiting);
        self.at(Instant::now() + TAKE_PATIENCE, Timer::Waiting(port));
        Ok(())
    }

    /// A process has accepted a wake-up connection.
    pub(crate) fn take(&mut self, index: usize, wake_port: u16) -> Result<(), String> {
        let Some(waiting) = self.waiting.remove(&wake_port) else {
            let library = self.libraries.get(index).ok_or("gone")?;
            return library.send(&FromDaemon::Nothing, None).map_err(|e| e.to_string());
        };
        for table in &waiting.tables {
            table.remove_wake_port(wake_port);
        }
        let library = self.libraries.get_mut(index).ok_or("gone")?;
        let delivery = library.take_delivery().ok_or("delivery table full")?;
        if let Some(slots) = &library.slots {
            slots.open_delivery(delivery);
        }
        let place = Place::Process { library: (index, library.serial), delivery: Some(delivery) };
        let deliver = Deliver { delivery, ..waiting.deliver };
        library
            .send(&FromDaemon::Deliver(deliver), Some(waiting.socket.as_raw_fd()))
            .map_err(|e| e.to_string())?;
        if let Some(served) = self.served.get_mut(&waiting.key) {
            served.place = place;
        }
        Ok(())
    }

    /// Nobody accepted the wake-up: the connection is closed with it.
    pub(crate) fn waiting_deadline(&mut self, port: u16) {
        if let Some(waiting) = self.waiting.remove(&port) {
            for table in &waiting.tables {
                table.remove_wake_port(port);
            }
            log::warn!("port {} does not accept: closing a connection", waiting.deliver.listen_port);
            drop(waiting.socket);
            self.expect_end(&waiting.key);
        }
    }

    /// Starts a handler process; its outcome comes to `on_spawned`.
    pub(crate) fn exec(&mut self, key: &ServedKey, command: Vec<String>, socket: OwnedFd) {
        let Some(served) = self.served.get(key) else { return };
        let job = Job {
            node: key.0.to_string(),
            id: key.1,
            command,
            environment: vec![
                ("XO_CLIENT_ADDR", served.client.ip().to_string()),
                ("XO_CLIENT_PORT", served.client.port().to_string()),
                ("XO_SERVER_ADDR", served.host.ip().to_string()),
                ("XO_SERVER_PORT", served.host.port().to_string()),
                ("XO_HOST_NODE", key.0.to_string()),
                ("XO_HANDLER", served.handler.clone()),
            ],
            socket,
        };
        if self.spawner.jobs.send(job).is_err() {
            self.target_event(key, &TargetEvent::Handed(Err(Reason::NoHandler)));
        }
    }

    /// Handler processes have started, or failed to.
    pub(crate) fn on_spawned(&mut self) {
        while let Some(Spawned { node, id, result }) = self.spawner.done.pop() {
            let key = (Rc::from(node), id);
            let outcome = match result {
                Ok(child) => {
                    if let Some(served) = self.served.get_mut(&key) {
                        served.place = Place::Child(Box::new(child));
                    }
                    Ok(())
                }
                Err(e) => {
                    log::error!("starting a handler: {e}");
                    Err(Reason::NoHandler)
                }
            };
            self.target_event(&key, &TargetEvent::Handed(outcome));
        }
    }

    /// Handler processes that have ended.
    pub(crate) fn reap_children(&mut self) {
        let mut ended = Vec::new();
        for (key, served) in &mut self.served {
            if let Place::Child(child) = &mut served.place
                && !matches!(child.try_wait(), Ok(None))
            {
                ended.push(key.clone());
            }
        }
        for key in ended {
            if let Some(served) = self.served.get_mut(&key) {
                served.place = Place::None;
            }
            self.expect_end(&key);
        }
    }

    /// A process under the library is gone, and with it the connections it served.
    pub(crate) fn forget_process(&mut self, index: usize, serial: u64) {
        self.acceptors.retain(|a| a.library != index);
        let its = |p: &Place| matches!(p, Place::Process { library, .. } if *library == (index, serial));
        let keys: Vec<_> = self.served.iter().filter(|(_, s)| its(&s.place)).map(|(k, _)| k.clone()).collect();
        for key in keys {
            self.expect_end(&key);
        }
    }
}

/// Address of a listening TCP socket, and whether it takes IPv6 only.
fn listening(socket: &OwnedFd) -> io::Result<(SocketAddr, bool)> {
    let socket = SockRef::from(socket);
    if !socket.is_listener()? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let address = local_address(&socket)?;
    Ok((address, address.is_ipv6() && socket.only_v6()?))
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

struct Job {
    node: String,
    id: u64,
    command: Vec<String>,
    environment: Vec<(&'static str, String)>,
    socket: OwnedFd,
}

struct Spawned {
    node: String,
    id: u64,
    result: io::Result<Child>,
}

/// A thread that starts processes, so that the event loop does not wait for fork and exec.
pub(crate) struct Spawner {
    jobs: Sender<Job>,
    done: Arc<ArrayQueue<Spawned>>,
}

impl Spawner {
    /// Starts the thread; it ends with the daemon.
    pub(crate) fn start(waker: Arc<Waker>) -> io::Result<Spawner> {
        let (jobs, todo) = channel::<Job>();
        let done = Arc::new(ArrayQueue::new(SPAWN_QUEUE));
        let results = Arc::clone(&done);
        std::thread::Builder::new().name("xo-spawn".into()).spawn(move || {
            for job in todo {
                let mut spawned = Spawned { node: job.node, id: job.id, result: Err(io::ErrorKind::Other.into()) };
                spawned.result = spawn(&job.command, &job.environment, job.socket);
                while let Err(back) = results.push(spawned) {
                    spawned = back;
                    std::thread::yield_now();
                }
                let _ = waker.wake();
            }
        })?;
        Ok(Spawner { jobs, done })
    }
}

fn spawn(command: &[String], environment: &[(&str, String)], socket: OwnedFd) -> io::Result<Child> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    let out = OwnedFd::from(stream.try_clone()?);
    Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::from(OwnedFd::from(stream)))
        .stdout(Stdio::from(out))
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))
}
