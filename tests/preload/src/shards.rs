//! Objects that belong to one node each: a request's path names the node that must answer it.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::bed::Bed;
use crate::content;
use crate::program::Program;
use crate::servers::{PEER_PORT, PeerdOptions, WEB, address};

/// Directories of objects, and of uploads.
const DIRECTORIES: [&str; 2] = ["img", "up"];

impl Bed {
    /// Host and targets.
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.nodes().into_iter().filter(|n| n == "host" || n.starts_with('t')).collect()
    }

    /// A policy by which `/img/NODE/` and `/up/NODE/` are served on that node.
    #[must_use]
    pub fn sharded_policy(&self) -> String {
        let mut text = "listen = [80]\n[targets]\n".to_owned();
        let targets = self.servers().into_iter().filter(|n| n != "host").collect::<Vec<_>>();
        for t in &targets {
            text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(t));
        }
        for directory in DIRECTORIES {
            for node in targets.iter().map(String::as_str).chain(["host"]) {
                let to = if node == "host" { "local" } else { node };
                text += &format!(
                    "[[rule]]\npath_prefix = \"/{directory}/{node}/\"\nto = [\"{to}\"]\nhandler = \"web\"\n"
                );
            }
        }
        text
    }

    /// Daemons and nginx on all of them, each nginx with the objects of its own only.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn sharded(&self) -> Vec<Program> {
        let options = self.sharded_options("");
        let mut programs: Vec<_> = self.servers().iter().map(|n| self.peerd(n, &options)).collect();
        programs.extend(self.sharded_servers(false));
        programs
    }

    /// Configuration of the daemons; `head` goes into it.
    #[must_use]
    pub fn sharded_options(&self, head: &str) -> PeerdOptions {
        let policy = self.file("shards.toml", &self.sharded_policy());
        let head = format!("{head}\ninsecure = true\npolicy = \"{}\"", policy.display());
        PeerdOptions { head, sections: WEB.into() }
    }

    /// nginx on all of them, when the daemons are there; `everywhere`: each has the objects of all.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn sharded_servers(&self, everywhere: bool) -> Vec<Program> {
        let nodes = self.servers();
        let mut programs = Vec::new();
        for node in &nodes {
            for shard in nodes.iter().filter(|n| everywhere || *n == node) {
                self.write_shard(node, shard);
            }
            let mut command = self.preloaded(node, "nginx");
            command.env("XO_POLICY", self.directory().join("shards.toml"));
            programs.push(self.nginx_with(node, command));
        }
        for node in &nodes {
            // Two workers, each with an IPv4 and an IPv6 socket.
            if node == "host" {
                continue;
            }
            self.wait_acceptors(node, "web", 4);
        }
        self.wait_connected(&nodes);
        programs
    }

    fn write_shard(&self, node: &str, shard: &str) {
        let root = self.root(node);
        for directory in DIRECTORIES {
            let below = root.join(directory).join(shard);
            fs::create_dir_all(&below).expect("a directory");
            fs::set_permissions(&below, fs::Permissions::from_mode(0o777)).expect("its mode");
        }
        for (name, size) in content::SIZES {
            let path = format!("/img/{shard}/{name}");
            fs::write(root.join(&path[1..]), content::of(&path, size)).expect("an object");
        }
    }

    /// Waits until each daemon is connected to all targets.
    ///
    /// # Panics
    /// When they do not come to be.
    pub fn wait_connected(&self, nodes: &[String]) {
        for node in nodes {
            let connected = || {
                let status = self.try_status(node)?;
                let peers = status["peers"].as_array()?;
                let up = |t: &String| peers.iter().any(|p| p["node"] == **t && p["state"] == "connected");
                nodes.iter().filter(|t| *t != node).all(up).then_some(())
            };
            let up = crate::program::wait_for(std::time::Duration::from_secs(20), || connected().is_some());
            assert!(up, "peers of {node}: {:?}", self.try_status(node));
        }
    }
}
