//! At load: originals, settings, tables. nginx's workers have an empty environment and no privileges, so all
//! that comes from the environment is read here.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use xo_proto::policy::Policy;

use crate::log::complain;
use crate::{alone, conn, daemon, fdtable, hooks, layer, log, mode, policy, spawn, tls};

const DEFAULT_SOCKET: &str = "/run/xo/peerd.sock";
const DEFAULT_HEAD_TIMEOUT_MS: u64 = 5_000;

static ACTIVE: AtomicBool = AtomicBool::new(false);
static HEAD_TIMEOUT_MS: AtomicU64 = AtomicU64::new(DEFAULT_HEAD_TIMEOUT_MS);

/// Runs before main, and before the constructors of most libraries; hooks called earlier pass through.
#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = constructor;

extern "C" fn constructor() {
    hooks::resolve();
    let is_set = |name: &str| env::var_os(name).is_some_and(|v| !v.is_empty() && v != "0");
    if is_set("XO_DISABLE") {
        return;
    }
    log::start(&env::var("XO_LOG").unwrap_or_default());
    match own_policy() {
        Ok(Some(own)) if !own.is_inert() => {
            let ports = env::var_os("XO_LISTEN").map(|_| own.listen.clone());
            policy::start(own, ports.unwrap_or_default());
        }
        Ok(_) => return,
        Err(text) => return complain(format_args!("{text}; nothing will be offloaded")),
    }
    if let Some(ms) = env::var("XO_HEAD_TIMEOUT_MS").ok().and_then(|v| v.parse().ok()) {
        HEAD_TIMEOUT_MS.store(ms, Ordering::Relaxed);
    }
    let socket = env::var_os("XO_SOCKET").unwrap_or_else(|| OsString::from(DEFAULT_SOCKET));
    if is_set("XO_TLS_CHECK") {
        tls::check();
    }
    spawn::remember(is_set("XO_INSECURE"));
    let ready = fdtable::start() && conn::start() && mode::start() && daemon::start(PathBuf::from(socket));
    if ready {
        daemon::process();
        alone::start();
        // SAFETY: functions of ours, which are never unloaded.
        unsafe {
            libc::pthread_atfork(Some(layer::about_to_fork), Some(alone::forked), Some(daemon::forked))
        };
    }
    ACTIVE.store(ready, Ordering::Release);
}

fn own_policy() -> Result<Option<Policy>, String> {
    let variable = |name: &str| env::var(name).ok();
    let path = variable("XO_POLICY").filter(|p| !p.is_empty());
    let text = match &path {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|e| format!("XO_POLICY {path}: {e}"))?),
        None => None,
    };
    let (listen, targets, rules) = (variable("XO_LISTEN"), variable("XO_TARGETS"), variable("XO_RULES"));
    Policy::load(text.as_deref(), listen.as_deref(), targets.as_deref(), rules.as_deref())
        .map_err(|e| format!("{}:{e}", path.as_deref().unwrap_or("environment")))
}

/// The policy, when there is one that can move anything.
pub(crate) fn active_policy() -> Option<&'static Policy> {
    if ACTIVE.load(Ordering::Acquire) { policy::current() } else { None }
}

/// How long an incomplete request head is held back, ns.
pub(crate) fn head_timeout_ns() -> u64 {
    HEAD_TIMEOUT_MS.load(Ordering::Relaxed) * 1_000_000
}
