//! Starting a daemon where there is none, so that LD_PRELOAD alone suffices on a host.

use std::env;
use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use once_cell::race::OnceBox;
use xo_sys::raw;

use crate::daemon;

const PLACES: [&str; 4] =
    ["/usr/local/sbin/xo-peerd", "/usr/local/bin/xo-peerd", "/usr/sbin/xo-peerd", "/usr/bin/xo-peerd"];
/// How long the daemon may take to become ready.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
/// The descriptor on which the daemon reports.
const READY_FD: i32 = 3;

static BINARY: OnceBox<PathBuf> = OnceBox::new();
/// Pause between two attempts, ns.
const PAUSE_NS: u64 = 10_000_000_000;

static NOT_BEFORE: AtomicU64 = AtomicU64::new(0);
static INSECURE: AtomicBool = AtomicBool::new(false);

/// Reads what is needed from the environment, at load.
pub(crate) fn remember(insecure: bool) {
    INSECURE.store(insecure, Ordering::Relaxed);
    let named = env::var_os("XO_PEERD").filter(|p| !p.is_empty()).map(PathBuf::from);
    let beside = || own_path().map(|p| p.with_file_name("xo-peerd")).filter(|p| p.exists());
    let installed = || PLACES.iter().map(PathBuf::from).find(|p| p.exists());
    if let Some(path) = named.or_else(beside).or_else(installed) {
        let _ = BINARY.set(Box::new(path));
    }
}

/// The file that this library was loaded from.
fn own_path() -> Option<PathBuf> {
    // SAFETY: an all-zero Dl_info is valid; the address is within this library; the name is a C string that
    // lives as long as the library.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(own_path as *const libc::c_void, &raw mut info) == 0 || info.dli_fname.is_null() {
            return None;
        }
        Some(PathBuf::from(OsStr::from_bytes(CStr::from_ptr(info.dli_fname).to_bytes())))
    }
}

/// Starts the daemon and waits until it is ready. Only root may; everybody else runs without.
pub(crate) fn start_daemon() -> bool {
    let (Some(binary), Some(socket)) = (BINARY.get(), daemon::socket()) else { return false };
    let now = raw::monotonic().as_nanos() as u64;
    if raw::effective_user() != 0 || now < NOT_BEFORE.load(Ordering::Relaxed) {
        return false;
    }
    // A server with many listening sockets asks for each of them.
    NOT_BEFORE.store(now + PAUSE_NS, Ordering::Relaxed);
    let Some(arguments) = arguments(binary, socket) else { return false };
    let environment = environment();
    let (Ok((ours, theirs)), Ok(null)) = (raw::pipe(), raw::open_null()) else { return false };
    let pointers = |all: &[CString]| -> Vec<*const libc::c_char> {
        all.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // SAFETY: the child makes only system calls before exec, on memory prepared above.
    let started = unsafe { raw::start_detached(&argv, &envp, &null, &theirs, READY_FD) };
    drop(theirs);
    if started.is_err() {
        return false;
    }
    raw::wait_readable(std::os::fd::AsRawFd::as_raw_fd(&ours), PATIENCE);
    let ready = raw::read_byte(&ours) == Some(b'1');
    if ready {
        log::info!("started {}", binary.display());
    } else {
        log::error!("{} did not become ready", binary.display());
    }
    ready
}

fn arguments(binary: &Path, socket: &Path) -> Option<Vec<CString>> {
    let ready = READY_FD.to_string();
    let mut all: Vec<&[u8]> = vec![
        binary.as_os_str().as_bytes(),
        b"run",
        b"--embedded",
        b"--socket",
        socket.as_os_str().as_bytes(),
        b"--ready-fd",
        ready.as_bytes(),
    ];
    if INSECURE.load(Ordering::Relaxed) {
        all.push(b"--insecure");
    }
    all.into_iter().map(|a| CString::new(a).ok()).collect()
}

/// The daemon must not run under the library.
fn environment() -> Vec<CString> {
    let kept = |name: &OsStr| {
        let name = name.as_bytes();
        matches!(name, b"PATH" | b"LANG" | b"TZ" | b"RUST_LOG") || name.starts_with(b"XO_")
    };
    env::vars_os()
        .filter(|(name, _)| kept(name))
        .filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok())
        .collect()
}
