//! The exchange with the kernel: blocking, one request at a time.

use std::io;
use std::net::{Ipv4Addr, SocketAddr as FlowAddress};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcAttribute, TcFilterFlowerOption, TcMessage, TcOption, TcStats2,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::rule::{self, Hook, Place, Rewrite, Rule, Unfit};

/// Longer than any answer that is asked for.
const LONGEST_ANSWER: usize = 32 << 10;
/// Names that [`Channel::probe`] uses for its rule.
const PROBE_PREFERENCE: u16 = 0xfff0;
/// linux/errno.h.
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel, or the NIC's driver, refuses. ENOENT: there is no such rule, or no cls_flower, or one of the actions is missing.
    #[error("refused: {0}")]
    Refused(io::Error),
    /// The netlink socket.
    #[error("netlink: {0}")]
    Exchange(#[from] io::Error),
    /// An answer that cannot be understood.
    #[error("netlink: {0}")]
    Answer(String),
    /// A rule that says something impossible.
    #[error(transparent)]
    Unfit(#[from] Unfit),
}

/// What an interface takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Rules of the kernel: cls_flower and the actions are there.
    pub software: bool,
    /// Rules in the NIC.
    pub hardware: bool,
}

/// A netlink socket in the network namespace it was made in. Needs CAP_NET_ADMIN there.
pub struct Channel {
    socket: Socket,
    sequence: u32,
}

impl Channel {
    /// Opens it.
    ///
    /// # Errors
    /// Of socket(2) and bind(2).
    pub fn open() -> Result<Channel, Error> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Channel { socket, sequence: 0 })
    }

    /// Gives an interface a clsact, if it has none.
    ///
    /// # Errors
    /// `Refused`, `Exchange`.
    pub fn clsact(&mut self, interface: u32) -> Result<(), Error> {
        match self.ask(rule::clsact(interface)) {
            Err(Error::Refused(e)) if e.raw_os_error() == Some(EEXIST) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Adds a rule; it is in force when this returns.
    ///
    /// # Errors
    /// `Refused` (EEXIST when there is one of its name), `Exchange`, `Unfit`.
    pub fn add(&mut self, rule: &Rule) -> Result<(), Error> {
        self.ask(rule::add(rule)?).map(drop)
    }

    /// Removes a rule. One that is gone already is fine.
    ///
    /// # Errors
    /// `Refused`, `Exchange`.
    pub fn remove(&mut self, rule: &Rule) -> Result<(), Error> {
        match self.ask(rule::remove(rule)) {
            Err(Error::Refused(e)) if e.raw_os_error() == Some(ENOENT) => Ok(()),
            other => other.map(drop),
        }
    }

    /// How many packets have met the rule.
    ///
    /// # Errors
    /// `Refused` (ENOENT when there is none), `Exchange`, `Answer`.
    pub fn packets(&mut self, rule: &Rule) -> Result<u64, Error> {
        let answer = self.ask(rule::get(rule))?;
        let shown = answer.as_ref().and_then(last_action).and_then(counted);
        shown.map(u64::from).ok_or_else(|| Error::Answer("a rule without counters".into()))
    }

    /// Tries with a rule for a connection that cannot be (0.0.0.0 to itself). The interface has a clsact afterwards.
    ///
    /// # Errors
    /// `Refused` when there can be no clsact, `Exchange`.
    pub fn probe(&mut self, interface: u32) -> Result<Taken, Error> {
        self.clsact(interface)?;
        let nobody = FlowAddress::from((Ipv4Addr::UNSPECIFIED, 0));
        let rewrite = Rewrite {
            source: None,
            destination: Some(nobody),
            ethernet: Some(([0; 6], [0; 6])),
            out: Some(interface),
        };
        let mut takes = |place| {
            let rule = Rule {
                interface,
                hook: Hook::Ingress,
                place,
                preference: PROBE_PREFERENCE,
                handle: 1,
                source: nobody,
                destination: nobody,
                rewrite,
            };
            match self.add(&rule) {
                Ok(()) => self.remove(&rule).map(|()| true),
                Err(Error::Refused(_)) => Ok(false),
                Err(e) => Err(e),
            }
        };
        Ok(Taken { software: takes(Place::Software)?, hardware: takes(Place::Hardware)? })
    }

    /// One request; the rule that comes in answer, if one does.
    fn ask(&mut self, mut request: NetlinkMessage<RouteNetlinkMessage>) -> Result<Option<TcMessage>, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        request.header.sequence_number = self.sequence;
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut shown = None;
        loop {
            let mut answers = Vec::with_capacity(LONGEST_ANSWER);
            self.socket.recv(&mut answers, 0)?;
            let mut rest = answers.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| Error::Answer(e.to_string()))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length.max(16)..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(shown),
                    NetlinkPayload::Error(e) => return Err(Error::Refused(e.to_io())),
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(rule)) => {
                        shown = Some(rule);
                    }
                    _ => {}
                }
            }
        }
    }
}

fn last_action(rule: &TcMessage) -> Option<&TcAction> {
    let options = rule.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        TcOption::Flower(TcFilterFlowerOption::Actions(actions)) => actions.last(),
        _ => None,
    })
}

fn counted(action: &TcAction) -> Option<u32> {
    let stats = action.attributes.iter().find_map(|attribute| match attribute {
        TcActionAttribute::Stats(stats) => Some(stats),
        _ => None,
    })?;
    stats.iter().find_map(|stat| match stat {
        TcStats2::Basic(basic) => Some(basic.packets),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_refuses_has_its_number() {
        let mut channel = Channel::open().expect("a netlink socket");
        // As root ENODEV or EINVAL, else EPERM.
        for _ in 0..2 {
            let e = channel.probe(u32::MAX >> 1).expect_err("there is no such interface");
            assert!(matches!(&e, Error::Refused(e) if e.raw_os_error().is_some()), "{e}");
        }
    }
}
