//! `xo-peerd drain`, `undrain`, `reload`: tells the daemon, and waits.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use xo_proto::ipc::Query;

use crate::status;

/// How often the daemon is asked how many connections are left.
const POLL: Duration = Duration::from_millis(200);
/// The time was over, or the daemon did not answer.
const FAILED: u8 = 1;
/// What was asked for cannot be done.
const WRONG: u8 = 2;

/// What `drain` is told.
#[derive(clap::Args)]
pub(crate) struct Drain {
    /// Node name of the target
    target: String,
    /// Return when it has no connections of this machine any more
    #[arg(long)]
    wait: bool,
    /// With --wait: give up after so many seconds, with exit code 1
    #[arg(long, requires = "wait", value_name = "SECONDS")]
    timeout: Option<f64>,
    #[command(flatten)]
    at: Socket,
}

/// What `undrain` is told.
#[derive(clap::Args)]
pub(crate) struct Undrain {
    /// Node name of the target
    target: String,
    #[command(flatten)]
    at: Socket,
}

/// Which daemon.
#[derive(clap::Args)]
pub(crate) struct Socket {
    /// The daemon's Unix socket
    #[arg(long, default_value = crate::config::DEFAULT_SOCKET)]
    socket: PathBuf,
}

/// `xo-peerd drain`.
///
/// # Errors
/// When the daemon does not answer.
pub(crate) fn drain(told: &Drain) -> Result<ExitCode, Box<dyn Error>> {
    let begun = Instant::now();
    if let Some(code) = set(&told.at.socket, &told.target, true)? {
        return Ok(code);
    }
    if told.wait { wait(told, begun) } else { Ok(ExitCode::SUCCESS) }
}

fn wait(told: &Drain, begun: Instant) -> Result<ExitCode, Box<dyn Error>> {
    let mut said = None;
    loop {
        let left = connections(&told.at.socket, &told.target)?;
        if said.replace(left) != Some(left) {
            println!("{}: {left} connections left", told.target);
        }
        if left == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        if told.timeout.is_some_and(|t| begun.elapsed().as_secs_f64() >= t) {
            eprintln!("xo-peerd: {} still has {left} connections; it goes on draining", told.target);
            return Ok(ExitCode::from(FAILED));
        }
        thread::sleep(POLL);
    }
}

/// `xo-peerd undrain`.
///
/// # Errors
/// When the daemon does not answer.
pub(crate) fn undrain(told: &Undrain) -> Result<ExitCode, Box<dyn Error>> {
    Ok(set(&told.at.socket, &told.target, false)?.unwrap_or(ExitCode::SUCCESS))
}

/// `xo-peerd reload`.
///
/// # Errors
/// When the daemon does not answer.
pub(crate) fn reload(at: &Socket) -> Result<ExitCode, Box<dyn Error>> {
    let answer = ask(&at.socket, Query::Reload)?;
    if let Some(code) = wrong(&answer) {
        return Ok(code);
    }
    let changed = if answer["changed"] == true { "in force" } else { "unchanged" };
    println!("policy {}: {changed}", answer["policy_epoch"]);
    Ok(ExitCode::SUCCESS)
}

fn set(socket: &Path, target: &str, on: bool) -> Result<Option<ExitCode>, Box<dyn Error>> {
    Ok(wrong(&ask(socket, Query::Drain { node: target.to_owned(), on })?))
}

fn ask(socket: &Path, query: Query) -> Result<Value, Box<dyn Error>> {
    Ok(serde_json::from_str(&status::ask(socket, query)?)?)
}

/// Says what the daemon found wrong.
fn wrong(answer: &Value) -> Option<ExitCode> {
    let error = answer["error"].as_str()?;
    eprintln!("xo-peerd: {error}");
    Some(ExitCode::from(WRONG))
}

fn connections(socket: &Path, target: &str) -> Result<u64, Box<dyn Error>> {
    let status = ask(socket, Query::Status)?;
    let mut targets = status["targets"].as_array().into_iter().flatten();
    let its = targets.find(|t| t["node"] == target);
    Ok(its.and_then(|t| t["connections"].as_u64()).unwrap_or_default())
}
