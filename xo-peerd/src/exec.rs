//! Handler mode `exec`: one new process for each connection, with the connection as standard input and output.

use std::io;
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use crossbeam_queue::ArrayQueue;
use mio::Waker;
use xo_proto::handoff::TargetEvent;
use xo_proto::reason::Reason;
use xo_sys::raw::{self, Fd};

use crate::acceptor::Place;
use crate::engine::{Engine, ServedKey};

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
        let job = Job {
            reserve: served.reserve.take(),
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
}

struct Job {
    reserve: Option<Reserve>,
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
                let mut spawned =
                    Spawned { node: job.node, id: job.id, result: Err(io::ErrorKind::Other.into()) };
                drop(job.reserve);
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
    let mut handler = Command::new(program);
    // SAFETY: one system call, with numbers only, between fork and exec.
    unsafe {
        handler.pre_exec(|| {
            // Run as an ordinary user with ambient capabilities, the daemon would pass them on.
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
            Ok(())
        });
    }
    handler
        .args(arguments)
        .envs(environment.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::from(OwnedFd::from(stream)))
        .stdout(Stdio::from(out))
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("{program}: {e}")))
}
