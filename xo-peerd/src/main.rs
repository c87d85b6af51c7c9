//! XO's daemon: holds the privileges, moves connections, steers packets.

mod acceptor;
mod certs;
mod clock;
mod config;
mod daemon;
mod dial;
mod drain;
mod ends;
mod engine;
mod exec;
mod flower;
mod held;
mod host;
mod ipc;
mod ktls;
mod links;
mod metrics;
mod metrics_http;
mod onward;
mod peer;
mod peers;
mod pool;
mod recent;
mod records;
mod recover;
mod relay;
mod reload;
mod restore;
mod spin;
mod state;
mod status;
mod steer;
mod target;
mod targets;
mod timers;
mod times;
mod tls;
mod unflushed;
mod views;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xo_proto::ipc::Query;

use crate::config::{Config, DEFAULT_SOCKET};
use crate::daemon::RunOptions;

/// Moves live TCP connections between machines.
#[derive(Parser)]
#[command(version, about, after_help = "Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Run {
        /// Configuration file
        #[arg(long, required_unless_present = "embedded")]
        config: Option<PathBuf>,
        /// Started by the library of a server: no configuration file, ends with its last server
        #[arg(long, hide = true, conflicts_with = "config", requires = "socket")]
        embedded: bool,
        /// Unix socket of an embedded daemon
        #[arg(long, hide = true, requires = "embedded")]
        socket: Option<PathBuf>,
        /// Peers of an embedded daemon are not authenticated
        #[arg(long, hide = true, requires = "embedded")]
        insecure: bool,
        /// Descriptor to report readiness on
        #[arg(long, hide = true)]
        ready_fd: Option<i32>,
    },
    /// Check a configuration file and the policy and certificates that it names
    Check {
        /// Configuration file
        #[arg(long)]
        config: PathBuf,
    },
    /// Show what the daemon does
    Status(Ask),
    /// Show the connections that are offloaded from here or served here
    Flows(Ask),
    /// Give a target no more connections, and have those that it has leave it at their next request
    Drain(drain::Drain),
    /// Give a target connections again
    Undrain(drain::Undrain),
    /// Read the policy file again, now
    Reload(drain::Socket),
    /// Make certificates: a CA, if there is none in DIR, and one for each node
    Certs {
        /// Directory of ca.pem, ca.key, NODE.pem and NODE.key
        dir: PathBuf,
        /// Node names, as in peerd.toml
        #[arg(required = true)]
        nodes: Vec<String>,
        /// Replace certificates of these nodes
        #[arg(long)]
        force: bool,
    },
}

#[derive(clap::Args)]
struct Ask {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// The daemon's Unix socket
    #[arg(long, default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    let (result, code) = match Arguments::parse().command {
        Command::Run { config, embedded, socket, insecure, ready_fd } => {
            let config = match (config, socket) {
                (Some(path), _) => Config::load(&path),
                (None, socket) => {
                    Ok(Config::embedded(socket.unwrap_or_else(|| DEFAULT_SOCKET.into()), insecure))
                }
            };
            match config {
                Ok(config) => (daemon::run(config, &RunOptions { embedded, ready_fd }), 1),
                Err(e) => (Err(e.into()), 2),
            }
        }
        Command::Check { config } => (check(&config), 2),
        Command::Status(ask) => (show(&ask, &Query::Status), 1),
        Command::Flows(ask) => (show(&ask, &Query::Flows), 1),
        Command::Drain(told) => return ended(drain::drain(&told)),
        Command::Undrain(told) => return ended(drain::undrain(&told)),
        Command::Reload(at) => return ended(drain::reload(&at)),
        Command::Certs { dir, nodes, force } => (certs::make(&dir, &nodes, force).map_err(Into::into), 1),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xo-peerd: {e}");
            ExitCode::from(code)
        }
    }
}

fn ended(result: Result<ExitCode, Box<dyn Error>>) -> ExitCode {
    result.unwrap_or_else(|e| {
        eprintln!("xo-peerd: {e}");
        ExitCode::FAILURE
    })
}

fn check(path: &Path) -> Result<(), Box<dyn Error>> {
    let config = Config::load(path)?;
    if let Some(files) = &config.tls {
        tls::Tls::load(files)?.check_node(&config.node)?;
    }
    println!("{}: fine", path.display());
    Ok(())
}

fn show(ask: &Ask, query: &Query) -> Result<(), Box<dyn Error>> {
    let text = status::ask(&ask.socket, query.clone())?;
    let json = serde_json::from_str(&text)?;
    match query {
        _ if ask.json => println!("{text}"),
        Query::Status => print!("{}", status::table(&json)),
        _ => print!("{}", status::flows_table(&json)),
    }
    Ok(())
}
