//! The policy in force: this process's own, until the daemon has one.
//!
//! The daemon's comes by the board. A new one is parsed by whichever thread meets it first, and put in the place of the
//! old one by a single store; meanwhile, and if it cannot be parsed, the old one stays. Old ones are never freed: a
//! thread may be deciding by one, and to know that it is not would cost each decision two writes to memory that all
//! threads share. A policy is some kilobytes and a reload an operator's act.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

use once_cell::race::OnceBox;
use xo_proto::policy::Policy;
use xo_sys::board::Board;

use crate::{daemon, fdtable};

/// What this process was started with.
static OWN: OnceBox<Policy> = OnceBox::new();
/// Ports of `XO_LISTEN`.
static OWN_PORTS: OnceBox<Vec<u16>> = OnceBox::new();
/// The daemon's, once it has one.
static TAKEN: AtomicPtr<Policy> = AtomicPtr::new(std::ptr::null_mut());
/// Which daemon (upper half) and which of its policies has been looked at.
static LOOKED_AT: AtomicU64 = AtomicU64::new(0);
static LOOKING: AtomicBool = AtomicBool::new(false);

/// At load: what the environment says. `ports` are those of `XO_LISTEN`.
pub(crate) fn start(policy: Policy, ports: Vec<u16>) {
    let _ = OWN.set(Box::new(policy));
    let _ = OWN_PORTS.set(Box::new(ports));
}

/// The policy in force.
pub(crate) fn current() -> Option<&'static Policy> {
    // SAFETY: policies are leaked, never freed.
    unsafe { TAKEN.load(Ordering::Acquire).as_ref() }.or_else(|| OWN.get())
}

/// May restored connections come out of a listening socket on this port, or connections be followed from there?
pub(crate) fn names(port: u16) -> bool {
    OWN.get().is_some_and(|p| p.listen.contains(&port)) || follows(port)
}

/// Are new connections on this port followed?
pub(crate) fn follows(port: u16) -> bool {
    current().is_some_and(|p| p.listen.contains(&port)) || OWN_PORTS.get().is_some_and(|p| p.contains(&port))
}

/// Has the daemon a newer policy?
#[inline]
pub(crate) fn refresh() {
    let Some(board) = daemon::board() else { return };
    let version = u64::from(daemon::epoch()) << 32 | u64::from(board.policy_epoch());
    if LOOKED_AT.load(Ordering::Relaxed) != version {
        look(board, version);
    }
}

#[cold]
fn look(board: &Board, version: u64) {
    if LOOKING.swap(true, Ordering::Acquire) {
        return;
    }
    match board.policy() {
        Some((epoch, text)) => {
            match Policy::parse(&text) {
                Ok(policy) => take(policy, epoch),
                Err(e) => log::error!("xo-peerd's policy: {e}"),
            }
            LOOKED_AT.store(version, Ordering::Relaxed);
        }
        None if board.policy_epoch() == 0 => LOOKED_AT.store(version, Ordering::Relaxed),
        // It is just being replaced.
        None => {}
    }
    LOOKING.store(false, Ordering::Release);
}

fn take(policy: Policy, epoch: u32) {
    let new_port = |port: &u16| !names(*port);
    let other_ports = policy.listen.iter().any(new_port);
    TAKEN.store(Box::into_raw(Box::new(policy)), Ordering::Release);
    if other_ports {
        fdtable::forget_others();
    }
    log::info!("policy {epoch} of xo-peerd is in force");
}
