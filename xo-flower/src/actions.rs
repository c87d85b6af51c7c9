//! The actions of a rule: pedit, csum, mirred. netlink-packet-route has types for mirred only; the others' attributes are
//! made of bytes (linux/tc_act/tc_pedit.h, tc_csum.h).

use std::net::{IpAddr, SocketAddr};

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirrorOption, TcActionOption, TcActionType,
    TcMirror, TcMirrorActionType,
};

use crate::rule::Rewrite;

const TCA_PEDIT_PARMS_EX: u16 = 4;
const TCA_PEDIT_KEYS_EX: u16 = 5;
const TCA_PEDIT_KEY_EX: u16 = 6;
const TCA_PEDIT_KEY_EX_HTYPE: u16 = 1;
const TCA_PEDIT_KEY_EX_CMD: u16 = 2;
const CMD_SET: u16 = 0;
const TCA_CSUM_PARMS: u16 = 1;
const CSUM_IPV4: u32 = 1;
const CSUM_TCP: u32 = 8;

/// Headers that pedit counts offsets from (`enum pedit_header_type`).
#[derive(Clone, Copy)]
enum Header {
    Ethernet = 1,
    Ip4 = 2,
    Ip6 = 3,
    Tcp = 4,
}

/// Four bytes of a header, as they are in the packet: those that stay are ones in `kept`.
struct Edit {
    header: Header,
    offset: u32,
    kept: [u8; 4],
    value: [u8; 4],
}

/// All that becomes of a packet, in order.
pub(crate) fn of(rewrite: &Rewrite) -> Vec<TcAction> {
    let edits = edits(rewrite);
    let mut all = Vec::new();
    if !edits.is_empty() {
        all.push(action("pedit", pedit(&edits)));
    }
    if let Some(address) = rewrite.destination.or(rewrite.source) {
        // The last action, where the packet goes on its way.
        let then = if rewrite.out.is_some() { TcActionType::Pipe } else { TcActionType::Ok };
        all.push(action("csum", csum(address, then)));
    }
    if let Some(out) = rewrite.out {
        let mut mirror = TcMirror::default();
        mirror.generic = generic(TcActionType::Stolen);
        mirror.eaction = TcMirrorActionType::EgressRedir;
        mirror.ifindex = out;
        all.push(action("mirred", vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]));
    }
    for (number, action) in (1..).zip(&mut all) {
        action.tab = number;
    }
    all
}

fn action(kind: &str, options: Vec<TcActionOption>) -> TcAction {
    let mut action = TcAction::default();
    action.attributes = vec![TcActionAttribute::Kind(kind.into()), TcActionAttribute::Options(options)];
    action
}

fn generic(action: TcActionType) -> TcActionGeneric {
    let mut generic = TcActionGeneric::default();
    generic.action = action;
    generic
}

/// The fields that all actions' parameters begin with (`tc_gen`).
fn head(action: TcActionType) -> Vec<u8> {
    let generic = generic(action);
    let mut bytes = vec![0; generic.buffer_len()];
    generic.emit(&mut bytes);
    bytes
}

fn edits(rewrite: &Rewrite) -> Vec<Edit> {
    let mut all = Vec::new();
    if let Some((to, from)) = rewrite.ethernet {
        let bytes: Vec<u8> = to.into_iter().chain(from).collect();
        all.extend(words(Header::Ethernet, 0, &bytes));
    }
    // Offsets of the addresses in their headers.
    for (address, v4, v6) in [(rewrite.source, 12, 8), (rewrite.destination, 16, 24)] {
        match address.map(|a| a.ip()) {
            Some(IpAddr::V4(ip)) => all.extend(words(Header::Ip4, v4, &ip.octets())),
            Some(IpAddr::V6(ip)) => all.extend(words(Header::Ip6, v6, &ip.octets())),
            None => {}
        }
    }
    // Both ports are in the first word.
    let port = |address: Option<SocketAddr>| address.map_or([0; 2], |a| a.port().to_be_bytes());
    let kept = |address: Option<SocketAddr>| if address.is_some() { [0; 2] } else { [0xff; 2] };
    let pair = |[a, b]: [u8; 2], [c, d]: [u8; 2]| [a, b, c, d];
    if rewrite.source.is_some() || rewrite.destination.is_some() {
        all.push(Edit {
            header: Header::Tcp,
            offset: 0,
            kept: pair(kept(rewrite.source), kept(rewrite.destination)),
            value: pair(port(rewrite.source), port(rewrite.destination)),
        });
    }
    all
}

/// Edits of whole words from `offset` on.
fn words(header: Header, offset: u32, bytes: &[u8]) -> impl Iterator<Item = Edit> {
    let word = |chunk: &[u8]| chunk.try_into().unwrap_or_default();
    let values: Vec<[u8; 4]> = bytes.chunks(4).map(word).collect();
    (offset..).step_by(4).zip(values).map(move |(offset, value)| Edit { header, offset, kept: [0; 4], value })
}

/// `struct tc_pedit_sel` with its keys, then what header each key is for.
fn pedit(edits: &[Edit]) -> Vec<TcActionOption> {
    let mut selector = head(TcActionType::Pipe);
    // nkeys, flags, and two bytes before the first key's alignment.
    selector.extend([edits.len() as u8, 0, 0, 0]);
    let mut headers = Vec::new();
    for edit in edits {
        selector.extend(edit.kept);
        selector.extend(edit.value);
        selector.extend(edit.offset.to_ne_bytes());
        // at, offmask, shift: no offset that depends on the packet.
        selector.extend([0; 12]);
        let of = [
            DefaultNla::new(TCA_PEDIT_KEY_EX_HTYPE, (edit.header as u16).to_ne_bytes().to_vec()),
            DefaultNla::new(TCA_PEDIT_KEY_EX_CMD, CMD_SET.to_ne_bytes().to_vec()),
        ];
        headers.push(DefaultNla::new(TCA_PEDIT_KEY_EX | NLA_F_NESTED, emitted(&of)));
    }
    vec![
        TcActionOption::Other(DefaultNla::new(TCA_PEDIT_PARMS_EX, selector)),
        TcActionOption::Other(DefaultNla::new(TCA_PEDIT_KEYS_EX | NLA_F_NESTED, emitted(&headers))),
    ]
}

/// `struct tc_csum`: which checksums to compute.
fn csum(address: SocketAddr, then: TcActionType) -> Vec<TcActionOption> {
    let which = if address.is_ipv4() { CSUM_IPV4 | CSUM_TCP } else { CSUM_TCP };
    let mut parameters = head(then);
    parameters.extend(which.to_ne_bytes());
    vec![TcActionOption::Other(DefaultNla::new(TCA_CSUM_PARMS, parameters))]
}

fn emitted(attributes: &[DefaultNla]) -> Vec<u8> {
    let mut bytes = vec![0; attributes.buffer_len()];
    attributes.emit(&mut bytes);
    bytes
}
