//! nginx and xo-peerd as the tests run them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::Bed;
use crate::bed::built;
use crate::content;
use crate::program::{Program, slowness, wait_for};

/// What a test's daemon needs besides the usual.
#[derive(Clone, Debug, Default)]
pub struct PeerdOptions {
    /// More lines for the head of peerd.toml.
    pub head: String,
    /// Handlers and other sections; empty for `web`, attached to port 80.
    pub sections: String,
}

/// The daemon's port.
pub const PEER_PORT: u16 = 7400;

/// The handler that most tests use.
pub const WEB: &str = "[[handler]]\nname = \"web\"\nmode = \"attach\"\nport = 80\n";

/// IPv4 address of a node.
///
/// # Panics
/// For the router, which has one for each node.
#[must_use]
pub fn address(node: &str) -> String {
    let number = |prefix: &str| node.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok());
    let net = match node {
        "client" => 1,
        "host" => 2,
        _ => number("t").map(|n| n + 2).or_else(|| number("host").map(|n| n + 100)).expect("a node"),
    };
    format!("10.{net}.0.2")
}

/// IPv6 address of a node.
#[must_use]
pub fn address6(node: &str) -> String {
    let v4 = address(node);
    format!("fd00:{}::2", v4.split('.').nth(1).unwrap_or_default())
}

impl Bed {
    /// A policy: `/img/` and `/up/` go to all targets in turn, `/loc/` stays.
    #[must_use]
    pub fn usual_policy(&self) -> PathBuf {
        let targets: Vec<_> = self.nodes().into_iter().filter(|n| n.starts_with('t')).collect();
        let names = targets.iter().map(|t| format!("\"{t}\"")).collect::<Vec<_>>().join(", ");
        let mut text = "listen = [80]\n[targets]\n".to_owned();
        for t in &targets {
            text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(t));
        }
        for prefix in ["/img/", "/up/"] {
            text += &format!("[[rule]]\npath_prefix = \"{prefix}\"\nto = [{names}]\nhandler = \"web\"\n");
        }
        self.file("policy.toml", &text)
    }

    /// The daemon's socket on a node.
    #[must_use]
    pub fn socket(&self, node: &str) -> PathBuf {
        self.directory().join(format!("{node}.sock"))
    }

    /// Starts a daemon on a node and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub fn peerd(&self, node: &str, options: &PeerdOptions) -> Program {
        let handlers = if options.sections.is_empty() { WEB } else { &options.sections };
        let head = if options.head.is_empty() { "insecure = true" } else { &options.head };
        let mut text = format!(
            "node = \"{node}\"\nlisten = \"{}:{PEER_PORT}\"\nsocket = \"{}\"\n{head}\n",
            address(node),
            self.socket(node).display(),
        );
        let slower = slowness();
        if slower > 1 && !head.contains("handoff") {
            // The early order gives a connection up that is not confirmed within 0.3 s, which an emulated processor may need.
            text += "handoff = \"strict\"\n";
        }
        if slower > 1 && !head.contains("limits") && !handlers.contains("limits") {
            // The defaults are meant for machines.
            text += &format!("limits.timeout_ms = {}\n", 100 * slower);
            text += &format!("limits.connect_timeout_ms = {}\n", 500 * slower);
        }
        text += handlers;
        let config = self.file(&format!("{node}.toml"), &text);
        let mut command = Command::new(built("xo-peerd"));
        command.args(["run", "--config"]).arg(config).env("RUST_LOG", log_level());
        let mut program = self.start(node, &format!("{node}-peerd"), &mut command);
        let up = wait_for(Duration::from_secs(20), || {
            assert!(program.is_alive(), "xo-peerd on {node} ended: {}", program.output());
            self.try_status(node).is_some()
        });
        assert!(up, "xo-peerd on {node} does not answer");
        program
    }

    /// The output of `xo-peerd status --json`, if a daemon answers.
    #[must_use]
    pub fn try_status(&self, node: &str) -> Option<Value> {
        let mut command = Command::new(built("xo-peerd"));
        let output = command.args(["status", "--json", "--socket"]).arg(self.socket(node)).output().ok()?;
        if output.status.success() { serde_json::from_slice(&output.stdout).ok() } else { None }
    }

    /// The output of `xo-peerd flows`.
    #[must_use]
    pub fn flows(&self, node: &str) -> String {
        let mut command = Command::new(built("xo-peerd"));
        let output = command.args(["flows", "--socket"]).arg(self.socket(node)).output();
        output.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stdout).into_owned())
    }

    /// A number in the status of a node's daemon, by JSON pointer.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn status(&self, node: &str, pointer: &str) -> u64 {
        let status = self.try_status(node).expect("a daemon that answers");
        status.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} in {status}"))
    }

    /// Waits until no connection is offloaded from or served on these nodes.
    ///
    /// # Panics
    /// When some stay.
    pub fn wait_idle(&self, nodes: &[&str]) {
        self.wait_idle_for(Duration::from_secs(20), nodes);
    }

    /// As [`Bed::wait_idle`], for connections that may take so long to end.
    ///
    /// # Panics
    /// When some stay.
    pub fn wait_idle_for(&self, limit: Duration, nodes: &[&str]) {
        for node in nodes {
            let idle = wait_for(limit, || {
                let zero = |pointer| self.status(node, pointer) == 0;
                zero("/flows_hosted") && zero("/flows_served") && zero("/steering/flow_entries")
            });
            assert!(
                idle,
                "connections are left on {node}: {:?}\n{}",
                self.try_status(node),
                nodes.iter().map(|n| self.flows(n)).collect::<String>()
            );
        }
    }

    /// None of these daemons has refused a hand-off, nor lost one.
    ///
    /// # Panics
    /// When one has.
    pub fn nothing_refused(&self, nodes: &[&str]) {
        for node in nodes {
            let status = self.try_status(node).expect("a status");
            let why = (&status["refused_by_reason"], &status["failed_by_reason"]);
            let counts = (&status["refused_total"], &status["failed_total"]);
            assert_eq!(counts, (&0.into(), &0.into()), "{node}: {why:?}");
        }
    }

    /// After daemon and server of a node have been stopped: no file, no BPF program is left of them.
    ///
    /// # Panics
    /// When something is.
    pub fn nothing_left(&self, node: &str) {
        assert!(!self.socket(node).exists(), "the socket of {node}");
        let net = self.run(node, Command::new("bpftool").args(["net", "show"]));
        assert!(!net.contains("xo_"), "BPF programs on {node}: {net}");
        let filters = self.run(node, Command::new("tc").args(["filter", "show", "dev", "eth0", "ingress"]));
        assert_eq!(filters, "", "filters on {node}");
        assert!(!self.pins(node).exists(), "{} is left", self.pins(node).display());
    }

    /// A program under the library, with the bed's usual policy.
    #[must_use]
    pub fn preloaded(&self, node: &str, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("LD_PRELOAD", built("libxo_preload.so"))
            .env("XO_POLICY", self.usual_policy())
            .env("XO_SOCKET", self.socket(node))
            .env("XO_LOG", log_level());
        command
    }

    /// Document root of a node.
    #[must_use]
    pub fn root(&self, node: &str) -> PathBuf {
        self.directory().join(format!("{node}-root"))
    }

    /// Writes nginx's configuration for a node, and the objects it serves.
    #[must_use]
    pub fn nginx_config(&self, node: &str, workers: u32) -> PathBuf {
        let root = self.root(node);
        if !root.exists() {
            content::write_all(&root);
        }
        let directory = self.directory().display();
        let error_log = self.directory().join(format!("{node}-nginx-error.log"));
        self.show_on_failure(&error_log);
        let text = format!(
            "user www-data; worker_processes {workers}; daemon off; pid {directory}/{node}-nginx.pid;\n\
             error_log {} notice;\n\
             events {{ worker_connections 8192; }}\n\
             http {{ access_log off; sendfile on; keepalive_requests 1000000; keepalive_timeout 60s;\n\
             client_body_temp_path {directory}/{node}-body; client_max_body_size 100m;\n\
             server {{ listen 80; listen [::]:80; root {}; add_header X-Node {node} always;\n\
             location ~ ^/(upo?|put)/ {{ dav_methods PUT DELETE; }} }} }}\n",
            error_log.display(),
            root.display(),
        );
        self.file(&format!("{node}-nginx.conf"), &text)
    }

    /// Starts nginx under the library on a node and waits until it listens.
    pub fn nginx(&self, node: &str) -> Program {
        self.nginx_with(node, self.preloaded(node, "nginx"))
    }

    /// Starts nginx by this command.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn nginx_with(&self, node: &str, command: Command) -> Program {
        let config = self.nginx_config(node, 2);
        self.nginx_configured(node, command, &config)
    }

    /// Starts nginx by this command, with this configuration.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn nginx_configured(&self, node: &str, mut command: Command, config: &Path) -> Program {
        command.args(["-e", "stderr", "-c"]).arg(config);
        let mut program = self.start(node, &format!("{node}-nginx"), &mut command);
        self.wait_listening(node, 80, &mut program);
        program
    }

    /// Waits until a program listens on a port of its node.
    ///
    /// # Panics
    /// When it ends or does not listen in time.
    pub fn wait_listening(&self, node: &str, port: u16, program: &mut Program) {
        let hex = format!(":{port:04X} ");
        let listens = wait_for(Duration::from_secs(20), || {
            assert!(program.is_alive(), "ended: {}", program.output());
            self.on(node, || {
                let read = |f| fs::read_to_string(format!("/proc/thread-self/net/{f}")).unwrap_or_default();
                read("tcp") + &read("tcp6")
            })
            .lines()
            .any(|l| l.contains(&hex) && l.contains(" 0A "))
        });
        assert!(listens, "nobody listens on port {port} of {node}");
    }

    /// Waits until a daemon knows this many places that accept restored connections for a handler.
    ///
    /// # Panics
    /// When it does not get to know them.
    pub fn wait_acceptors(&self, node: &str, handler: &str, count: u64) {
        let pointer = format!("/acceptors/{handler}");
        let known = wait_for(Duration::from_secs(20), || {
            let status = self.try_status(node);
            status.and_then(|s| s.pointer(&pointer)?.as_u64()).is_some_and(|n| n >= count)
        });
        assert!(known, "handler {handler} on {node}: {:?}", self.try_status(node));
    }

    /// Daemons and nginx on the host and all targets.
    #[must_use]
    pub fn everything(&self) -> Vec<Program> {
        self.everything_with(&PeerdOptions::default())
    }

    /// As [`Bed::everything`], with other options for the daemons.
    ///
    /// # Panics
    /// When something does not start.
    #[must_use]
    pub fn everything_with(&self, options: &PeerdOptions) -> Vec<Program> {
        let nodes = self.nodes();
        let serving = || nodes.iter().filter(|n| *n == "host" || n.starts_with('t'));
        let mut programs: Vec<_> = serving().map(|n| self.peerd(n, options)).collect();
        programs.extend(serving().map(|n| self.nginx(n)));
        for node in serving().filter(|n| *n != "host") {
            // Two workers, each with an IPv4 and an IPv6 socket.
            self.wait_acceptors(node, "web", 4);
        }
        programs
    }
}

fn log_level() -> String {
    std::env::var("XO_TEST_LOG").unwrap_or_else(|_| "info".into())
}
