//! HTTPS at the host, and targets whose servers speak plain HTTP on a port of their own: what comes there with TLS goes through
//! the library's record layer.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use serde_json::{Value, json};

use crate::content;
use crate::program::Program;
use crate::servers::{PEER_PORT, address};
use crate::tls::Https;

/// Where the targets' servers listen.
pub const PLAIN: u16 = 8080;
/// The handler that names it.
pub const HANDLER: &str = "[[handler]]\nname = \"plain\"\nmode = \"attach\"\nport = 8080\n";

impl Https {
    /// Names of the targets.
    #[must_use]
    pub fn targets(&self) -> Vec<String> {
        self.bed.servers().into_iter().filter(|n| n != "host").collect()
    }

    /// By this policy `/img/NODE/` and `/up/NODE/` are served on that target, and what has no rule wherever it is.
    #[must_use]
    pub fn target_policy(&self) -> String {
        let mut text = "listen = [443, 8080]\n[targets]\n".to_owned();
        for t in self.targets() {
            text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(&t));
        }
        for t in self.targets() {
            for directory in ["img", "up"] {
                text += &format!(
                    "[[rule]]\npath_prefix = \"/{directory}/{t}/\"\nto = [\"{t}\"]\nhandler = \"plain\"\n"
                );
            }
        }
        text
    }

    /// A program under the library, with that policy.
    #[must_use]
    pub fn with_policy(&self, node: &str, program: &str) -> Command {
        let mut command = self.bed.preloaded(node, program);
        let policy = self.bed.file("targets.toml", &self.target_policy());
        command.env("XO_POLICY", policy).env("XO_TLS_CHECK", "1");
        command
    }

    /// All nodes have the same objects, and take uploads, below their own name, too.
    ///
    /// # Panics
    /// When a file cannot be made.
    pub fn share_objects(&self) {
        let root = self.bed.root("host");
        content::write_all(&root);
        for node in self.targets() {
            symlink(&root, self.bed.root(&node)).expect("a link");
            for directory in ["img", "up"] {
                symlink(".", root.join(directory).join(&node)).expect("a link");
            }
        }
    }

    /// Daemons everywhere, nginx with TLS at the host, plain nginx on the targets.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn everything(&self) -> Vec<Program> {
        let policy = self.bed.file("targets.toml", &self.target_policy());
        let mut programs = self.daemons_for(&format!("policy = \"{}\"", policy.display()), HANDLER);
        self.share_objects();
        for node in self.targets() {
            programs.push(self.plain_nginx(&node));
        }
        programs.push(self.nginx("host", self.with_policy("host", "nginx"), ""));
        self.bed.wait_connected(&self.bed.servers());
        programs
    }

    /// nginx without TLS on a target.
    ///
    /// # Panics
    /// When it does not come up.
    #[must_use]
    pub fn plain_nginx(&self, node: &str) -> Program {
        let config = fs::read_to_string(self.bed.nginx_config(node, 2)).expect("a configuration");
        let config = config.replace("listen 80; listen [::]:80;", "listen 80; listen 8080; listen [::]:8080;");
        let path = self.bed.file(&format!("{node}-plain.conf"), &config);
        let program = self.bed.nginx_configured(node, self.with_policy(node, "nginx"), &path);
        self.bed.wait_acceptors(node, "plain", 4);
        program
    }

    /// Every connection's steps were served where they should have been, with the right bytes.
    ///
    /// # Panics
    /// When not.
    pub fn assert_places(&self, got: &Value, places: &[&str]) {
        for connection in got.as_array().into_iter().flatten() {
            let steps = connection["steps"].as_array().expect("steps");
            let expected: Vec<_> = places.iter().map(|p| json!([p, true])).collect();
            assert_eq!(*steps, expected, "{}", self.all_about());
        }
    }

    /// Hand-offs that were refused or failed anywhere, by reason.
    #[must_use]
    pub fn all_about(&self) -> String {
        let about = |node: &String| {
            let status = self.bed.try_status(node).unwrap_or_default();
            let [refused, failed, library] =
                ["refused_by_reason", "failed_by_reason", "library"].map(|key| &status[key]);
            format!("{node}: {refused} {failed} {library}\n")
        };
        self.bed.servers().iter().map(about).collect()
    }

    /// Nothing was refused, nothing failed, on any node.
    ///
    /// # Panics
    /// When something was.
    pub fn assert_nothing_refused(&self) {
        for node in self.bed.servers() {
            let status = self.bed.try_status(&node).expect("a status");
            let counts = ["refused_total", "failed_total"].map(|key| status[key].as_u64());
            assert_eq!(counts, [Some(0), Some(0)], "{}", self.all_about());
        }
    }
}
