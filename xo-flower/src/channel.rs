//! The exchange with the kernel: blocking, one request at a time.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcAttribute, TcFilterFlowerOption, TcMessage, TcOption, TcStats2,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::rule::{self, Hook, Place, Rule, Unfit};

/// Longer than any answer that is asked for.
const LONGEST_ANSWER: usize = 32 << 10;
/// Of [`Channel::probe`]'s rule.
const PROBE_PREFERENCE: u16 = 0xfff0;
/// linux/errno.h.
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;

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

/// An interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its Ethernet address.
    pub ethernet: [u8; 6],
    /// Longest packet, bytes from the network header on.
    pub mtu: u32,
    /// One end of a pair of virtual interfaces.
    pub is_veth: bool,
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

    /// Gives an interface a clsact; `false`: it has one already.
    ///
    /// # Errors
    /// `Refused`, `Exchange`.
    pub fn clsact(&mut self, interface: u32) -> Result<bool, Error> {
        match self.ask(rule::clsact(interface)) {
            Err(Error::Refused(e)) if e.raw_os_error() == Some(EEXIST) => Ok(false),
            other => other.map(|_| true),
        }
    }

    /// Adds a rule; it is in force when this returns.
    ///
    /// # Errors
    /// `Refused` (EEXIST when there is one of its name), `Exchange`, `Unfit`.
    pub fn add(&mut self, rule: &Rule) -> Result<(), Error> {
        self.ask(rule::add(rule)?).map(drop)
    }

    /// Removes a rule. One that is gone already is fine, alone or with its clsact or its interface.
    ///
    /// # Errors
    /// `Refused`, `Exchange`.
    pub fn remove(&mut self, rule: &Rule) -> Result<(), Error> {
        gone(self.ask(rule::remove(rule)))
    }

    /// Removes all rules of a preference (and the next higher one, for IPv6) from an interface.
    ///
    /// # Errors
    /// `Refused`, `Exchange`.
    pub fn remove_all(&mut self, interface: u32, hook: Hook, preference: u16) -> Result<(), Error> {
        [false, true]
            .into_iter()
            .try_for_each(|v6| gone(self.ask(rule::remove_all(interface, hook, preference, v6))))
    }

    /// Puts in the anchors of a preference, one for each family: rules that no packet can meet ([`rule::anchor`]). When the last rule of a
    /// preference goes, the kernel takes its classifier apart and unhooks it from the interface's packets, and does the reverse for the
    /// next one; with an anchor a rule that comes or goes is one entry of a table.
    ///
    /// # Errors
    /// As [`Channel::add`]; a NIC that takes rules of IPv4 only refuses the second.
    pub fn anchor(&mut self, interface: u32, hook: Hook, place: Place, preference: u16) -> Result<(), Error> {
        [false, true]
            .into_iter()
            .try_for_each(|v6| self.add(&rule::anchor(interface, hook, place, preference, v6)))
    }

    /// Removes the anchors; those that are gone are fine.
    ///
    /// # Errors
    /// As [`Channel::remove`].
    pub fn weigh_anchor(
        &mut self,
        interface: u32,
        hook: Hook,
        place: Place,
        preference: u16,
    ) -> Result<(), Error> {
        [false, true]
            .into_iter()
            .try_for_each(|v6| self.remove(&rule::anchor(interface, hook, place, preference, v6)))
    }

    /// Ethernet address of an interface; `None` where it has none.
    ///
    /// # Errors
    /// `Refused` (ENODEV), `Exchange`, `Answer`.
    pub fn ethernet(&mut self, interface: u32) -> Result<Option<[u8; 6]>, Error> {
        Ok(self.link(interface)?.map(|link| link.ethernet))
    }

    /// What is known of an interface that has an Ethernet address; `None` where it has none.
    ///
    /// # Errors
    /// `Refused` (ENODEV), `Exchange`, `Answer`.
    pub fn link(&mut self, interface: u32) -> Result<Option<Link>, Error> {
        let mut message = LinkMessage::default();
        message.header.index = interface;
        let Some(RouteNetlinkMessage::NewLink(link)) =
            self.ask(question(RouteNetlinkMessage::GetLink(message)))?
        else {
            return Ok(None);
        };
        let (mut ethernet, mut mtu, mut is_veth) = (None, 0, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(address) => ethernet = address.as_slice().try_into().ok(),
                LinkAttribute::Mtu(n) => mtu = *n,
                LinkAttribute::LinkInfo(infos) => {
                    is_veth = infos.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Veth)));
                }
                _ => {}
            }
        }
        Ok(ethernet.map(|ethernet| Link { ethernet, mtu, is_veth }))
    }

    /// Ethernet address of a neighbour, if the kernel knows it.
    ///
    /// # Errors
    /// `Refused`, `Exchange`, `Answer`.
    pub fn neighbour(&mut self, interface: u32, address: IpAddr) -> Result<Option<[u8; 6]>, Error> {
        Ok(self.find_neighbour(interface, address)?.and_then(|found| ethernet(&found)))
    }

    /// The same, and the kernel treats the neighbour as one that a packet was just sent to: it looks for its address if it has none,
    /// and asks again if it has not heard of it for a while.
    ///
    /// # Errors
    /// `Refused`, `Exchange`, `Answer`.
    pub fn use_neighbour(&mut self, interface: u32, address: IpAddr) -> Result<Option<[u8; 6]>, Error> {
        let found = self.find_neighbour(interface, address)?;
        let fixed = |state| matches!(state, NeighbourState::Permanent | NeighbourState::Noarp);
        // What an administrator has entered would become invalid by this request (`__neigh_update`, net/core/neighbour.c).
        if !found.as_ref().is_some_and(|found| fixed(found.header.state)) {
            let mut message = neighbour(interface, address);
            message.header.flags = NeighbourFlags::Use;
            let mut request = question(RouteNetlinkMessage::NewNeighbour(message));
            request.header.flags |= NLM_F_CREATE;
            self.ask(request)?;
        }
        Ok(found.and_then(|found| ethernet(&found)))
    }

    fn find_neighbour(&mut self, interface: u32, address: IpAddr) -> Result<Option<NeighbourMessage>, Error> {
        match self.ask(question(RouteNetlinkMessage::GetNeighbour(neighbour(interface, address)))) {
            Ok(Some(RouteNetlinkMessage::NewNeighbour(found))) => Ok(Some(found)),
            Err(Error::Refused(e)) if e.raw_os_error() == Some(ENOENT) => Ok(None),
            other => other.map(|_| None),
        }
    }

    /// How many packets have met the rule.
    ///
    /// # Errors
    /// `Refused` (ENOENT when there is none), `Exchange`, `Answer`.
    pub fn packets(&mut self, rule: &Rule) -> Result<u64, Error> {
        let answer = self.ask(rule::get(rule))?;
        let shown = match &answer {
            Some(RouteNetlinkMessage::NewTrafficFilter(rule)) => last_action(rule).and_then(counted),
            _ => None,
        };
        shown.map(u64::from).ok_or_else(|| Error::Answer("a rule without counters".into()))
    }

    /// Tries with a rule for a connection that cannot be (0.0.0.0 to itself). The interface has a clsact afterwards if it takes rules of
    /// some kind, or had one.
    ///
    /// # Errors
    /// `Refused` when there can be no clsact, `Exchange`.
    pub fn probe(&mut self, interface: u32) -> Result<Taken, Error> {
        let added = self.clsact(interface)?;
        let taken = self.try_both(interface);
        if added && !matches!(taken, Ok(t) if t.software || t.hardware) {
            self.ask(rule::remove_clsact(interface))?;
        }
        taken
    }

    fn try_both(&mut self, interface: u32) -> Result<Taken, Error> {
        let mut takes = |place| {
            let rule = rule::anchor(interface, Hook::Ingress, place, PROBE_PREFERENCE, false);
            match self.add(&rule) {
                Ok(()) => self.remove(&rule).map(|()| true),
                Err(Error::Refused(_)) => Ok(false),
                Err(e) => Err(e),
            }
        };
        Ok(Taken { software: takes(Place::Software)?, hardware: takes(Place::Hardware)? })
    }

    /// One request; what comes in answer besides the acknowledgement, if anything does.
    fn ask(
        &mut self,
        mut request: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<Option<RouteNetlinkMessage>, Error> {
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
                    NetlinkPayload::InnerMessage(answer) => shown = Some(answer),
                    _ => {}
                }
            }
        }
    }
}

fn question(message: RouteNetlinkMessage) -> NetlinkMessage<RouteNetlinkMessage> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    request.finalize();
    request
}

/// A neighbour's Ethernet address, if it is valid.
fn ethernet(found: &NeighbourMessage) -> Option<[u8; 6]> {
    let unknown = [NeighbourState::Incomplete, NeighbourState::Failed, NeighbourState::None];
    if unknown.contains(&found.header.state) {
        return None;
    }
    found.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    })
}

/// The message that names a neighbour.
fn neighbour(interface: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = interface;
    let (family, address) = match address {
        IpAddr::V4(ip) => (AddressFamily::Inet, NeighbourAddress::Inet(ip)),
        IpAddr::V6(ip) => (AddressFamily::Inet6, NeighbourAddress::Inet6(ip)),
    };
    message.header.family = family;
    message.attributes.push(NeighbourAttribute::Destination(address));
    message
}

/// Removed, or not there: ENOENT says that the rule is not, EINVAL that the clsact is not, ENODEV that the interface is not.
fn gone(result: Result<Option<RouteNetlinkMessage>, Error>) -> Result<(), Error> {
    match result {
        Err(Error::Refused(e)) if matches!(e.raw_os_error(), Some(ENOENT | EINVAL | ENODEV)) => Ok(()),
        other => other.map(drop),
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

    #[test]
    fn the_loopback_has_an_address_and_no_neighbours() {
        let mut channel = Channel::open().expect("a netlink socket");
        assert_eq!(channel.ethernet(1).expect("a link"), Some([0; 6]));
        let nobody = IpAddr::from([192, 0, 2, 1]);
        assert_eq!(channel.neighbour(1, nobody).expect("an answer"), None);
    }
}
