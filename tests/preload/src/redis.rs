//! Redis servers that hold different slots, and a client that says exactly what it sends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use xo_proto::resp::{SLOTS, key_slot};

use crate::bed::Bed;
use crate::program::Program;
use crate::servers::{PEER_PORT, PeerdOptions, address};

/// The servers' port.
pub const PORT: u16 = 6379;
const PATIENCE: Duration = Duration::from_secs(20);
const HANDLER: &str = "[[handler]]\nname = \"redis\"\nmode = \"attach\"\nport = 6379\n";

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`.
    Status(String),
    /// `-ERR ...`.
    Error(String),
    /// `:1`.
    Integer(i64),
    /// A string.
    Bulk(Vec<u8>),
    /// An array.
    Array(Vec<Reply>),
    /// No string, or no array.
    Null,
}

impl Reply {
    /// `+OK`.
    #[must_use]
    pub fn ok() -> Reply {
        Reply::Status("OK".into())
    }

    /// A string.
    #[must_use]
    pub fn bulk(text: &str) -> Reply {
        Reply::Bulk(text.into())
    }
}

/// A connection that speaks RESP2.
#[derive(Debug)]
pub struct Redis {
    stream: BufReader<TcpStream>,
}

/// A command as clients send it.
#[must_use]
pub fn command<A: AsRef<[u8]>>(arguments: &[A]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", arguments.len()).into_bytes();
    for argument in arguments {
        bytes.extend(format!("${}\r\n", argument.as_ref().len()).bytes());
        bytes.extend(argument.as_ref());
        bytes.extend(b"\r\n");
    }
    bytes
}

impl Redis {
    /// Connects from the calling thread's namespace.
    ///
    /// # Errors
    /// Of connect(2).
    pub fn to(address: &str) -> io::Result<Redis> {
        let stream = TcpStream::connect((address, PORT))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Redis { stream: BufReader::with_capacity(64 << 10, stream) })
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// Of write(2).
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// A command and its reply.
    ///
    /// # Errors
    /// When the stream ends early or is not RESP2.
    pub fn call<A: AsRef<[u8]>>(&mut self, arguments: &[A]) -> io::Result<Reply> {
        self.send(&command(arguments))?;
        self.reply()
    }

    /// The next reply.
    ///
    /// # Errors
    /// When the stream ends early or is not RESP2.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let bad = || io::Error::other(format!("not a reply: {line:?}"));
        let text = line.strip_suffix("\r\n").ok_or_else(bad)?;
        let (kind, rest) = text.split_at_checked(1).ok_or_else(bad)?;
        let number = || rest.parse::<i64>().map_err(|_| bad());
        Ok(match kind {
            "+" => Reply::Status(rest.into()),
            "-" => Reply::Error(rest.into()),
            ":" => Reply::Integer(number()?),
            "$" | "*" if number()? < 0 => Reply::Null,
            "$" => {
                let mut data = vec![0; number()? as usize + 2];
                self.stream.read_exact(&mut data)?;
                data.truncate(data.len() - 2);
                Reply::Bulk(data)
            }
            "*" => Reply::Array((0..number()?).map(|_| self.reply()).collect::<Result<_, _>>()?),
            _ => return Err(bad()),
        })
    }
}

/// The node that holds a key, of those that share the slots evenly.
#[must_use]
pub fn holder<'n>(nodes: &'n [String], key: &[u8]) -> &'n str {
    &nodes[usize::from(key_slot(key)) * nodes.len() / usize::from(SLOTS)]
}

impl Bed {
    /// A policy by which host and targets share the slots evenly.
    #[must_use]
    pub fn slots_policy(&self) -> String {
        let nodes = self.servers();
        let mut text = "listen = [{ port = 6379, protocol = \"redis\" }]\n[targets]\n".to_owned();
        for t in nodes.iter().filter(|n| *n != "host") {
            text += &format!("{t} = \"{}:{PEER_PORT}\"\n", address(t));
        }
        for (i, node) in nodes.iter().enumerate() {
            let begin = |i: usize| (i * usize::from(SLOTS)).div_ceil(nodes.len());
            let to = if node == "host" { "local" } else { node };
            text += &format!(
                "[[rule]]\nslots = [\"{}-{}\"]\nto = [\"{to}\"]\nhandler = \"redis\"\n",
                begin(i),
                begin(i + 1) - 1
            );
        }
        text
    }

    /// Daemons and Redis servers on all of them, each for its slots; `arguments` are for all servers.
    ///
    /// # Panics
    /// When they do not come up.
    #[must_use]
    pub fn redis_servers(&self, arguments: &[&str]) -> Vec<Program> {
        let policy = self.file("slots.toml", &self.slots_policy());
        let head = format!("insecure = true\npolicy = \"{}\"", policy.display());
        let options = PeerdOptions { head, sections: HANDLER.into() };
        let nodes = self.servers();
        let mut programs: Vec<_> = nodes.iter().map(|n| self.peerd(n, &options)).collect();
        for node in &nodes {
            let mut command = self.preloaded(node, "redis-server");
            command.env("XO_POLICY", &policy).env("XO_HEAD_TIMEOUT_MS", "500").args(arguments);
            programs.push(self.redis_with(node, command));
        }
        for node in nodes.iter().filter(|n| *n != "host") {
            self.wait_acceptors(node, "redis", 1);
        }
        self.wait_connected(&nodes);
        programs
    }

    /// Starts a Redis server by this command, which keeps nothing on disk.
    ///
    /// # Panics
    /// When it does not listen.
    pub fn redis_with(&self, node: &str, mut command: Command) -> Program {
        command.args(["--save", "", "--appendonly", "no", "--protected-mode", "no", "--bind", "*", "-::*"]);
        command.args(["--dir".as_ref(), self.directory().as_os_str()]);
        let mut program = self.start(node, &format!("{node}-redis"), &mut command);
        self.wait_listening(node, PORT, &mut program);
        program
    }
}
