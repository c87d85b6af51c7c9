//! What a rule is, and the requests that add and remove it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterFlowerOption, TcHandle, TcMessage, TcOption};

use crate::actions;

/// linux/if_ether.h.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const IPPROTO_TCP: u8 = 6;
/// TCA_CLS_FLAGS_*.
const SKIP_HW: u32 = 1;
const SKIP_SW: u32 = 2;
/// Bits of the TCP header (RFC 9293, 3.1): FIN, SYN, RST.
const BEGIN_OR_END: u16 = 0x07;
/// Handle of a preference's anchor ([`anchor`]).
pub const ANCHOR: u32 = u32::MAX;

/// Where packets meet a rule; both need the interface's clsact ([`clsact`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Packets that come in. After TCX programs, which may have sent them on already.
    Ingress,
    /// Packets that go out.
    Egress,
}

/// Who carries a rule out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The kernel only (`skip_hw`).
    Software,
    /// The NIC only (`skip_sw`); refused where it cannot.
    Hardware,
}

/// What becomes of a packet; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// New source address and port, of the flow's family.
    pub source: Option<SocketAddr>,
    /// New destination address and port, of the flow's family.
    pub destination: Option<SocketAddr>,
    /// New Ethernet addresses: destination, source.
    pub ethernet: Option<([u8; 6], [u8; 6])>,
    /// Number of the interface that it leaves by at once; `None`: it goes on its way.
    pub out: Option<u32>,
}

/// A rule for the packets of a TCP connection in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Number of the interface at which packets meet it.
    pub interface: u32,
    /// Where on it.
    pub hook: Hook,
    /// Who carries it out.
    pub place: Place,
    /// Its preference on this hook, 1 to 65534; the next higher one is used for IPv6, as each belongs to one protocol.
    pub preference: u16,
    /// Its number among the rules of this preference, not 0.
    pub handle: u32,
    /// Source of the packets.
    pub source: SocketAddr,
    /// Destination of the packets, of the same family.
    pub destination: SocketAddr,
    /// Also those that begin or end the connection (SYN, FIN, RST). Who follows it must see them, and does not if a NIC takes them.
    pub ends: bool,
    /// What to do with them.
    pub rewrite: Rewrite,
}

/// A rule that no packet can meet: it is for a connection that cannot be, of the unspecified address's port 0 with itself. Its keys,
/// masks and actions are those of rules for connections, so who takes it takes them, and what the kernel has for them is there.
#[must_use]
pub fn anchor(interface: u32, hook: Hook, place: Place, preference: u16, v6: bool) -> Rule {
    let ip = if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let nobody = SocketAddr::new(ip, 0);
    Rule {
        interface,
        hook,
        place,
        preference,
        handle: ANCHOR,
        source: nobody,
        destination: nobody,
        ends: false,
        rewrite: Rewrite {
            source: None,
            destination: Some(nobody),
            ethernet: Some(([0; 6], [0; 6])),
            out: Some(interface),
        },
    }
}

/// A request that adds the rule; one that is there already is an error (EEXIST).
///
/// # Errors
/// When addresses of both families are mixed, or a number is 0.
pub fn add(rule: &Rule) -> Result<NetlinkMessage<RouteNetlinkMessage>, Unfit> {
    check(rule)?;
    let mut message = named(rule);
    let mut options = keys(rule);
    options.push(TcFilterFlowerOption::Flags(match rule.place {
        Place::Software => SKIP_HW,
        Place::Hardware => SKIP_SW,
    }));
    options.push(TcFilterFlowerOption::Actions(actions::of(&rule.rewrite)));
    message.attributes.push(TcAttribute::Options(options.into_iter().map(TcOption::Flower).collect()));
    Ok(request(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE | NLM_F_EXCL))
}

/// A request that removes the rule.
#[must_use]
pub fn remove(rule: &Rule) -> NetlinkMessage<RouteNetlinkMessage> {
    request(RouteNetlinkMessage::DelTrafficFilter(named(rule)), 0)
}

/// A question about the rule, its counters among the answers.
#[must_use]
pub fn get(rule: &Rule) -> NetlinkMessage<RouteNetlinkMessage> {
    request(RouteNetlinkMessage::GetTrafficFilter(named(rule)), 0)
}

/// A request for an interface's clsact, to which rules are attached; EEXIST when it has one.
#[must_use]
pub fn clsact(interface: u32) -> NetlinkMessage<RouteNetlinkMessage> {
    request(RouteNetlinkMessage::NewQueueDiscipline(clsact_of(interface)), NLM_F_CREATE | NLM_F_EXCL)
}

fn clsact_of(interface: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

/// A request that removes all rules of a preference, of one family.
#[must_use]
pub fn remove_all(
    interface: u32,
    hook: Hook,
    preference: u16,
    v6: bool,
) -> NetlinkMessage<RouteNetlinkMessage> {
    request(RouteNetlinkMessage::DelTrafficFilter(name(interface, hook, preference, v6, 0)), 0)
}

/// A request that removes an interface's clsact, with all that is attached to it.
#[must_use]
pub fn remove_clsact(interface: u32) -> NetlinkMessage<RouteNetlinkMessage> {
    request(RouteNetlinkMessage::DelQueueDiscipline(clsact_of(interface)), 0)
}

/// A rule that says something impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a rule needs addresses of one family, a preference from 1 to 65534 and a handle")]
pub struct Unfit;

fn check(rule: &Rule) -> Result<(), Unfit> {
    let v6 = rule.source.is_ipv6();
    let rewritten = [rule.rewrite.source, rule.rewrite.destination];
    let others = rewritten.into_iter().flatten().chain([rule.destination]);
    let fits = others.into_iter().all(|address| address.is_ipv6() == v6);
    let numbered = rule.handle != 0 && (1..u16::MAX).contains(&rule.preference);
    if fits && numbered { Ok(()) } else { Err(Unfit) }
}

/// What names a rule: interface, hook, preference, protocol, handle.
fn named(rule: &Rule) -> TcMessage {
    name(rule.interface, rule.hook, rule.preference, rule.source.is_ipv6(), rule.handle)
}

/// Without a handle: all of this preference.
fn name(interface: u32, hook: Hook, preference: u16, v6: bool, handle: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    let minor = match hook {
        Hook::Ingress => TcHandle::MIN_INGRESS,
        Hook::Egress => TcHandle::MIN_EGRESS,
    };
    message.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    message.header.handle = TcHandle::from(handle);
    let preference = preference.saturating_add(v6.into());
    let protocol = if v6 { ETH_P_IPV6 } else { ETH_P_IP };
    message.header.info = u32::from(preference) << 16 | u32::from(protocol.to_be());
    message.attributes.push(TcAttribute::Kind("flower".into()));
    message
}

/// What a packet must be. Where there is no mask, all bits count.
fn keys(rule: &Rule) -> Vec<TcFilterFlowerOption> {
    use TcFilterFlowerOption as O;
    let protocol = if rule.source.is_ipv6() { ETH_P_IPV6 } else { ETH_P_IP };
    let source = match rule.source.ip() {
        IpAddr::V4(ip) => O::Ipv4Src(ip),
        IpAddr::V6(ip) => O::Ipv6Src(ip),
    };
    let destination = match rule.destination.ip() {
        IpAddr::V4(ip) => O::Ipv4Dst(ip),
        IpAddr::V6(ip) => O::Ipv6Dst(ip),
    };
    let ports = [O::TcpSrc(rule.source.port()), O::TcpDst(rule.destination.port())];
    let mut keys = vec![O::EthType(protocol), O::IpProto(IPPROTO_TCP), source, destination];
    keys.extend(ports);
    if !rule.ends {
        keys.extend([O::TcpFlags(0), O::TcpFlagsMask(BEGIN_OR_END)]);
    }
    keys
}

fn request(message: RouteNetlinkMessage, flags: u16) -> NetlinkMessage<RouteNetlinkMessage> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    request.finalize();
    request
}

#[cfg(test)]
mod tests;
