//! A routed network in namespaces, and the programs that run in it.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::{env, process};

use crate::program::Program;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Lines of each log shown when a test fails.
const SHOWN: usize = 30;

/// A raised bed. Namespaces and files have names of their own, so that beds do not meet.
#[derive(Debug)]
pub struct Bed {
    prefix: String,
    directory: PathBuf,
    targets: u32,
    hosts: u32,
    logs: RefCell<Vec<PathBuf>>,
}

impl Bed {
    /// Raises a bed with this many targets and hosts.
    ///
    /// # Panics
    /// When the bed does not come up.
    #[must_use]
    pub fn up(targets: u32, hosts: u32) -> Bed {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("xt{}n{number}-", process::id());
        let directory = env::temp_dir().join(format!("xo-{prefix}"));
        fs::create_dir_all(&directory).expect("the bed's directory");
        // nginx's workers and HAProxy run as other users.
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("its mode");
        let bed = Bed { prefix, directory, targets, hosts, logs: RefCell::default() };
        bed.testbed(&["up", "--targets", &targets.to_string(), "--hosts", &hosts.to_string()]);
        bed
    }

    fn testbed(&self, arguments: &[&str]) {
        let script = root().join("scripts/testbed");
        let status = Command::new(&script).args(arguments).env("XO_BED_PREFIX", &self.prefix).status();
        assert!(status.expect("scripts/testbed").success(), "scripts/testbed {arguments:?}");
    }

    /// Directory for the test's files; goes with the bed.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A file of this bed, with this text.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.directory.join(name);
        fs::write(&path, text).expect("a file of the bed");
        path
    }

    /// Names of all nodes, the router's last.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let targets = (1..=self.targets).map(|i| format!("t{i}"));
        let hosts = (2..=self.hosts).map(|i| format!("host{i}"));
        ["client", "host"]
            .map(String::from)
            .into_iter()
            .chain(hosts)
            .chain(targets)
            .chain(["router".into()])
            .collect()
    }

    /// The namespace of a node.
    ///
    /// # Panics
    /// When there is no such node.
    #[must_use]
    pub fn namespace(&self, node: &str) -> File {
        let path = format!("/run/netns/{}{node}", self.prefix);
        File::open(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    /// Where a node's daemon pins its programs and maps; the name ends in the namespace's number.
    #[must_use]
    pub fn pins(&self, node: &str) -> PathBuf {
        let namespace =
            fs::metadata(format!("/run/netns/{}{node}", self.prefix)).map_or(0, |about| about.ino());
        PathBuf::from(format!("/sys/fs/bpf/xo/{node}-{namespace}"))
    }

    /// Starts a program in a node; `name` is that of its log.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self, node: &str, name: &str, command: &mut Command) -> Program {
        let log = self.directory.join(format!("{name}.log"));
        self.show_on_failure(&log);
        Program::start(name, &self.namespace(node), &log, command)
    }

    /// When the test fails, the end of this file is shown.
    pub fn show_on_failure(&self, log: &Path) {
        let mut logs = self.logs.borrow_mut();
        if !logs.iter().any(|l| l == log) {
            logs.push(log.to_owned());
        }
    }

    /// Runs a command in a node to its end; its output.
    ///
    /// # Panics
    /// When it fails.
    pub fn run(&self, node: &str, command: &mut Command) -> String {
        crate::program::enter(command, &self.namespace(node));
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command:?}: {} {error}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `work` on a thread in a node's network.
    pub fn spawn<T: Send + 'static>(
        &self,
        node: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = self.namespace(node);
        std::thread::spawn(move || {
            enter(&namespace);
            work()
        })
    }

    /// As [`Bed::spawn`], and waits for its result.
    ///
    /// # Panics
    /// When `work` panics.
    pub fn on<T: Send + 'static>(&self, node: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self.spawn(node, work).join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// Puts the calling thread into a network namespace.
///
/// # Panics
/// When the kernel refuses.
pub fn enter(namespace: &File) {
    // SAFETY: numbers only; a thread may leave its process's network namespace.
    let result = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
    assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for log in self.logs.borrow().iter() {
                let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
                let lines: Vec<_> = text.lines().collect();
                let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
                eprintln!("---- {} ({} lines)\n{end}", log.display(), lines.len());
            }
        }
        for node in self.nodes() {
            // What a daemon that was killed has left pinned.
            let _ = fs::remove_dir_all(self.pins(&node));
        }
        let script = root().join("scripts/testbed");
        let _ = Command::new(script).arg("down").env("XO_BED_PREFIX", &self.prefix).status();
        if env::var_os("XO_KEEP_LOGS").is_none() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// The checkout.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the checkout")
}

/// A program or library of this build, beside the test binary.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let test = env::current_exe().expect("own path");
    let path = test.ancestors().nth(2).expect("target directory").join(name);
    assert!(path.exists(), "{} is missing: cargo build --workspace with the same profile", path.display());
    path
}
