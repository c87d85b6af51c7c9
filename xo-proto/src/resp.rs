//! Redis's protocol (RESP2 and RESP3): where a command ends, which keys it names, when its reply is complete, and what
//! a connection must not leave behind on the server that it has talked to.
//!
//! Nothing here changes a byte. Commands are framed as Redis frames them; what it would refuse, or what could be
//! understood in two ways, is refused here too, and such a connection is left alone.
//!
//! A client sends many commands at a time, so a look covers all that are there: those that are served here go to the
//! server in one read ([`Requests::look`]).

mod command;
mod commands;
mod reply;
mod request;
mod session;
mod slot;

pub use command::{Command, MAX_HEAD};
pub use reply::Replies;
pub use request::{Look, Requests, Run};
pub use slot::{SLOTS, key_slot};

#[cfg(test)]
mod tests;
