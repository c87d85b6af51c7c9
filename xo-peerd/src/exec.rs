//! Handler mode `exec`: one new process for each connection, with the connection as standard input and output; and the
//! starting of processes, for pools too.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use crossbeam_queue::ArrayQueue;
use mio::Waker;
use xo_proto::handoff::TargetEvent;
use xo_proto::reason::Reason;
use xo_proto::wire::HandoffId;
use xo_sys::raw::{self, Fd};

use crate::acceptor::Place;
use crate::engine::{Engine, ServedKey};

/// A worker's channel is this descriptor.
pub(crate) const WORKER_FD: RawFd = 3;
/// Handler processes being started at one time.
const SPAWN_QUEUE: usize = 1024;

/// Descriptors that starting a process takes, a second one of the connection and a pipe: kept from before the host is
/// told that the connection can be served here, for then there is no way back.
pub(crate) struct Reserve(#[expect(dead_code, reason = "only held")] [Fd; 3]);

impl Reserve {
    /// Takes them.
    pub(crate) fn take() -> io::Result<Reserve> {
        Ok(Reserve([raw::open_null()?, raw::open_null()?, raw::open_null()?]))
    }
}

impl Engine {
    /// Starts a handler process; its outcome comes to `on_spawned`.
    pub(crate) fn exec(&mut self, key: &ServedKey, command: Vec<String>, socket: OwnedFd) {
        let Some(served) = self.served.get_mut(key) else { return };
        let mut job = Job {
            reserve: served.reserve.take(),
            whose: Whose::Connection { node: key.0.to_string(), id: key.1 },
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
        if let Some(layer) = &served.layer {
            job.environment.push(("XO_TLS", layer.name().into()));
        }
        if self.spawner.start_process(job).is_err() {
            self.target_event(key, &TargetEvent::Handed(Err(Reason::NoHandler)));
        }
    }

    /// Handler processes have started, or failed to.
    pub(crate) fn on_spawned(&mut self) {
        while let Some(Spawned { whose, result }) = self.spawner.done.pop() {
            self.spawner.starting -= 1;
            let key = match whose {
                Whose::Connection { node, id } => (Rc::from(node), id),
                Whose::Worker { pool, post } => {
                    self.on_worker_spawned(pool, post, result);
                    continue;
                }
            };
            let outcome = match result {
                Ok(child) => {
                    if let Some(served) = self.served.get_mut(&key) {
                        served.place = Place::Child(Box::new(child));
                    }
                    Ok(())
                }
                Err(e) => {
                    log::error!("starting a handler: {e}");
                    // The last descriptor of the connection.
                    if let Some(served) = self.served.get_mut(&key) {
                        served.layer = None;
                    }
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
            if let Place::Child(child) = &mut served.place {
                match child.try_wait() {
                    Ok(None) => {}
                    result => ended.push((key.clone(), result.is_ok_and(|s| s.is_some_and(|s| s.success())))),
                }
            }
        }
        for (key, well) in ended {
            if well {
                self.say_goodbye(&key);
            }
            if let Some(served) = self.served.get_mut(&key) {
                served.place = Place::None;
                // Its client must see that what it has got may not be all.
                served.layer = None;
            }
            self.expect_end(&key);
        }
    }
}

/// A process to be started.
pub(crate) struct Job {
    /// Given up for it.
    pub(crate) reserve: Option<Reserve>,
    /// What it is for.
    pub(crate) whose: Whose,
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// Added to the daemon's own.
    pub(crate) environment: Vec<(&'static str, String)>,
    /// The connection, or the worker's channel.
    pub(crate) socket: OwnedFd,
}

/// What a process is for.
pub(crate) enum Whose {
    /// One connection.
    Connection {
        /// The host's node name.
        node: String,
        /// Its number there.
        id: HandoffId,
    },
    /// A pool.
    Worker {
        /// Which.
        pool: usize,
        /// Which of its places.
        post: usize,
    },
}

struct Spawned {
    whose: Whose,
    result: io::Result<Child>,
}

/// A thread that starts processes, so that the event loop does not wait for fork and exec.
pub(crate) struct Spawner {
    jobs: Sender<Job>,
    done: Arc<ArrayQueue<Spawned>>,
    /// Processes whose outcome is not known.
    starting: usize,
    _held: Option<Fd>,
}

impl Spawner {
    /// Starts the thread; it ends with the daemon.
    pub(crate) fn start(waker: Arc<Waker>) -> io::Result<Spawner> {
        let (jobs, todo) = channel::<Job>();
        let done = Arc::new(ArrayQueue::new(SPAWN_QUEUE));
        let results = Arc::clone(&done);
        // Where nothing else is, what std tells the outcome of exec by would come to be, and a worker's channel takes its place.
        // What the daemon has open by now it keeps open.
        let held = raw::duplicate_from(raw::open_null()?.as_raw_fd(), WORKER_FD)?;
        let held = Some(held).filter(|fd| fd.as_raw_fd() == WORKER_FD);
        std::thread::Builder::new().name("xo-spawn".into()).spawn(move || {
            for job in todo {
                drop(job.reserve);
                let result = match &job.whose {
                    Whose::Connection { .. } => spawn_handler(&job.command, job.socket),
                    Whose::Worker { .. } => Ok(spawn_worker(&job.command, &job.socket)),
                };
                let result = result.and_then(|command| spawn(command, &job.environment));
                let mut spawned = Spawned { whose: job.whose, result };
                while let Err(back) = results.push(spawned) {
                    spawned = back;
                    std::thread::yield_now();
                }
                let _ = waker.wake();
            }
        })?;
        Ok(Spawner { jobs, done, starting: 0, _held: held })
    }

    /// Starts a process; its outcome comes to `on_spawned`.
    pub(crate) fn start_process(&mut self, job: Job) -> io::Result<()> {
        self.jobs.send(job).map_err(|_| io::Error::other("the thread that starts processes has ended"))?;
        self.starting += 1;
        Ok(())
    }

    /// No process is being started: descriptors that have become free are nobody's.
    pub(crate) fn is_idle(&self) -> bool {
        self.starting == 0
    }
}

fn program(command: &[String]) -> Command {
    let (program, arguments) = command.split_first().map_or(("", &[][..]), |(p, a)| (p.as_str(), a));
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Its connection is its standard input and output.
fn spawn_handler(command: &[String], socket: OwnedFd) -> io::Result<Command> {
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(false)?;
    let out = OwnedFd::from(stream.try_clone()?);
    let mut handler = program(command);
    handler.stdin(Stdio::from(OwnedFd::from(stream))).stdout(Stdio::from(out));
    Ok(handler)
}

/// Its channel is on [`WORKER_FD`], what it says goes where the daemon's log goes.
fn spawn_worker(command: &[String], channel: &OwnedFd) -> Command {
    let mut worker = program(command);
    worker.stdin(Stdio::null());
    let channel = channel.as_raw_fd();
    // SAFETY: one system call, with numbers only, between fork and exec; the channel is open until the process is started.
    unsafe {
        worker.pre_exec(move || {
            if libc::dup2(channel, WORKER_FD) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    worker
}

fn spawn(mut command: Command, environment: &[(&str, String)]) -> io::Result<Child> {
    // SAFETY: one system call, with numbers only, between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // Run as an ordinary user with ambient capabilities, the daemon would pass them on.
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
            Ok(())
        });
    }
    let child = command.envs(environment.iter().map(|(k, v)| (k, v))).spawn();
    child.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", command.get_program().display())))
}
