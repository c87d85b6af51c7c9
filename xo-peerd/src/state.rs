//! What a daemon leaves to the next one beside the pinned maps: the ticket that servers' workers hold, and the names
//! that map entries refer to by number. A file beside the socket, readable by root only.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use xo_proto::ipc::Ticket;

/// The state file's content.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    ticket: Ticket,
    names: Vec<Named>,
    /// Targets that are to have no connections.
    #[serde(default)]
    draining: Vec<String>,
}

/// A peer or a handler.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Named {
    /// Node or handler name.
    pub(crate) name: String,
    /// Peer address of a target's daemon.
    pub(crate) address: Option<SocketAddr>,
}

/// The state, in memory and on disk.
#[derive(Debug)]
pub(crate) struct State {
    path: PathBuf,
    file: File,
}

impl State {
    /// Reads the state of an earlier daemon on this socket; without one (or with one that cannot be read) begins anew
    /// with this ticket.
    pub(crate) fn load(socket: &Path, ticket: Ticket) -> io::Result<State> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".state");
        let path = PathBuf::from(path);
        let known = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let state =
            State { path, file: known.unwrap_or(File { ticket, names: Vec::new(), draining: Vec::new() }) };
        state.save()?;
        Ok(state)
    }

    /// Proof that a process descends from a trusted one.
    pub(crate) fn ticket(&self) -> Ticket {
        self.file.ticket
    }

    /// The number of a name, given one if it is new.
    pub(crate) fn number(&mut self, name: &str, address: Option<SocketAddr>) -> u32 {
        let known = self.file.names.iter().position(|n| n.name == name && n.address == address);
        let number = known.unwrap_or_else(|| {
            self.file.names.push(Named { name: name.to_owned(), address });
            if let Err(e) = self.save() {
                log::error!("{}: {e}: a restarted daemon will not know '{name}'", self.path.display());
            }
            self.file.names.len() - 1
        });
        number as u32
    }

    /// What a number stands for.
    pub(crate) fn named(&self, number: u32) -> Option<&Named> {
        self.file.names.get(number as usize)
    }

    /// Targets that are to have no connections.
    pub(crate) fn draining(&self) -> &[String] {
        &self.file.draining
    }

    /// Sets them, for the next daemon too.
    pub(crate) fn set_draining(&mut self, nodes: Vec<String>) -> io::Result<()> {
        let before = std::mem::replace(&mut self.file.draining, nodes);
        self.save().inspect_err(|_| self.file.draining = before)
    }

    /// No connection is left to look after.
    pub(crate) fn remove(&self) {
        if self.file.draining.is_empty() {
            let _ = fs::remove_file(&self.path);
        }
    }

    fn save(&self) -> io::Result<()> {
        let mut new = self.path.clone().into_os_string();
        new.push(".new");
        let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        out.write_all(&serde_json::to_vec(&self.file)?)?;
        fs::rename(new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_next_daemon_knows_the_names_and_the_ticket() {
        let socket = std::env::temp_dir().join(format!("xo-state-{}", std::process::id()));
        let address = "10.0.0.1:7400".parse().ok();
        let mut first = State::load(&socket, [1; 16]).expect("state");
        assert_eq!((first.number("t1", address), first.number("web", None)), (0, 1));
        assert_eq!(first.number("t1", address), 0);
        let mode = fs::metadata(&first.path).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut second = State::load(&socket, [2; 16]).expect("state");
        assert_eq!(second.ticket(), [1; 16]);
        assert_eq!(second.named(0), Some(&Named { name: "t1".into(), address }));
        assert_eq!((second.number("web", None), second.named(2)), (1, None));
        fs::write(&second.path, "broken").expect("write");
        assert_eq!(State::load(&socket, [3; 16]).expect("state").ticket(), [3; 16]);
        let mut last = State::load(&socket, [4; 16]).expect("state");
        last.set_draining(vec!["t1".into()]).expect("saved");
        last.remove();
        let mut next = State::load(&socket, [5; 16]).expect("state");
        assert_eq!((next.draining(), next.ticket()), (&["t1".to_owned()][..], [3; 16]));
        next.set_draining(Vec::new()).expect("saved");
        next.remove();
        assert!(!next.path.exists());
    }
}
