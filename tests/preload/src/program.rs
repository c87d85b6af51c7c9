//! A process of a test: started in a namespace, killed with its descendants when dropped.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::random;

/// A running program, leader of its own process group.
#[derive(Debug)]
pub struct Program {
    name: String,
    child: Child,
    log: PathBuf,
}

/// Makes a command start in a network namespace.
pub fn enter(command: &mut Command, namespace: &File) {
    let namespace = namespace.try_clone().expect("a duplicate");
    // SAFETY: only system calls between fork and exec.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // Not even a killed test leaves a server behind.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

impl Program {
    /// Starts `command`, its output going to `log`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(name: &str, namespace: &File, log: &Path, command: &mut Command) -> Program {
        let out = File::options().create(true).append(true).open(log).expect("a log file");
        enter(command, namespace);
        command
            .stdin(Stdio::null())
            .stdout(out.try_clone().expect("a duplicate"))
            .stderr(out)
            .process_group(0);
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        Program { name: name.into(), child, log: log.to_owned() }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// It and all its descendants that are alive.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mut all = vec![self.pid()];
        let mut next = 0;
        while next < all.len() {
            let children = format!("/proc/{0}/task/{0}/children", all[next]);
            let text = fs::read_to_string(children).unwrap_or_default();
            all.extend(text.split_whitespace().filter_map(|p| p.parse::<u32>().ok()));
            next += 1;
        }
        all
    }

    /// Open descriptors of it and its descendants.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        let count = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        self.processes().iter().map(count).sum()
    }

    /// Processor time that it and its descendants have used.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        let ticks = |pid: &u32| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // User and system time are the 12th and 13th field after the name, which may hold anything.
            let fields: Vec<u64> = stat.rsplit(')').next().map_or_else(Vec::new, |rest| {
                rest.split_whitespace().skip(12).take(2).filter_map(|n| n.parse().ok()).collect()
            });
            fields.iter().sum::<u64>()
        };
        // Linux counts in hundredths of a second for user space, whatever its own clock does.
        Duration::from_millis(self.processes().iter().map(ticks).sum::<u64>() * 10)
    }

    /// Lets each of its processes open so many descriptors more than it has now.
    pub fn leave_descriptors(&self, more: usize) {
        self.processes().into_iter().for_each(|pid| leave_descriptors(pid, more));
    }

    /// As [`Program::leave_descriptors`], for it alone.
    pub fn leave_own_descriptors(&self, more: usize) {
        leave_descriptors(self.pid(), more);
    }

    /// Takes [`Program::leave_descriptors`] back.
    pub fn free_descriptors(&self) {
        for pid in self.processes() {
            limit_descriptors(pid, u64::MAX);
        }
    }

    /// What it has written.
    #[must_use]
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Is it still running?
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Puts it before others that want the processor: one that waits there for longer than the limits of docs/PROTOCOL.md is
    /// as good as away.
    ///
    /// # Panics
    /// When that is not allowed.
    pub fn prefer(&self) {
        // SAFETY: numbers only.
        let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, self.pid(), -15) };
        assert_eq!(result, 0, "setpriority: {}", std::io::Error::last_os_error());
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: numbers only.
        unsafe { libc::kill(self.pid() as i32, signal) };
    }

    /// Tells it to stop and waits; its exit code, if it has one.
    ///
    /// # Panics
    /// When it does not stop in time.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(libc::SIGTERM);
        let mut status = None;
        let ended = wait_for(Duration::from_secs(10), || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        });
        assert!(ended, "{} does not stop", self.name);
        status.and_then(|s| s.code())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: numbers only; the group is the child's own.
        unsafe { libc::kill(-(self.pid() as i32), libc::SIGKILL) };
        let _ = self.child.wait();
    }
}

fn leave_descriptors(pid: u32, more: usize) {
    let open: Vec<u64> = fs::read_dir(format!("/proc/{pid}/fd"))
        .map(|all| all.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect())
        .unwrap_or_default();
    let limit = (0..).filter(|n| !open.contains(n)).nth(more).expect("a number");
    limit_descriptors(pid, limit);
}

/// Sets how many descriptors a process may have, within its hard limit.
fn limit_descriptors(pid: u32, count: u64) {
    // SAFETY: both structures live through the calls.
    let result = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit);
        limit.rlim_cur = count.min(limit.rlim_max);
        libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut())
    };
    assert_eq!(result, 0, "prlimit of {pid}: {}", std::io::Error::last_os_error());
}

/// Keeps the calling thread, and all that it starts from now on, on one processor. On several, segments of one
/// connection overtake each other in the virtual links, which causes retransmissions that nobody else is to blame for.
///
/// # Panics
/// When the kernel refuses.
pub fn stay_on_one_processor() {
    // SAFETY: an all-zero set is valid; the kernel reads `set`.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set)
    };
    assert_eq!(result, 0, "sched_setaffinity: {}", std::io::Error::last_os_error());
}

/// How many times slower than a processor this machine is: an emulated one says so by XO_SLOWNESS (scripts/vm does). Limits
/// are so much longer; what is tested is the same.
#[must_use]
pub fn slowness() -> u32 {
    u32::try_from(random::setting("XO_SLOWNESS", 1)).expect("a small number")
}

/// Waits until `done`; false when it did not come true in time.
pub fn wait_for(limit: Duration, mut done: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit * slowness();
    loop {
        if done() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
