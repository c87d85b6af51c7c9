use netlink_packet_core::Nla;
use netlink_packet_route::tc::{TcAction, TcActionAttribute, TcActionOption};

use super::*;

fn v4() -> Rule {
    Rule {
        interface: 7,
        hook: Hook::Ingress,
        place: Place::Hardware,
        preference: 10,
        handle: 0x1234,
        source: "10.1.0.2:40000".parse().expect("an address"),
        destination: "10.2.0.2:80".parse().expect("an address"),
        ends: true,
        rewrite: Rewrite {
            source: None,
            destination: Some("10.3.0.2:8080".parse().expect("an address")),
            ethernet: Some(([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12])),
            out: Some(9),
        },
    }
}

fn v6() -> Rule {
    Rule {
        hook: Hook::Egress,
        place: Place::Software,
        source: "[fd00:3::2]:8080".parse().expect("an address"),
        destination: "[fd00:1::2]:40000".parse().expect("an address"),
        rewrite: Rewrite {
            source: Some("[fd00:2::2]:80".parse().expect("an address")),
            ..Rewrite::default()
        },
        ..v4()
    }
}

/// As the redirect [`v4`], for IPv6.
fn v6_in() -> Rule {
    let place = "[fd00:3::2]:8080".parse().expect("an address");
    let rewrite = Rewrite { destination: Some(place), ..v4().rewrite };
    Rule { source: v6().destination, destination: v6().source, rewrite, ..v4() }
}

/// A request as it goes to the kernel, read again.
fn sent(rule: &Rule) -> (NetlinkMessage<RouteNetlinkMessage>, TcMessage, Vec<TcFilterFlowerOption>) {
    let request = add(rule).expect("a fitting rule");
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    let read = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).expect("a message");
    let netlink_packet_core::NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(message)) =
        read.payload.clone()
    else {
        panic!("{read:?}");
    };
    let options = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let flower = |option: &TcOption| match option {
        TcOption::Flower(option) => option.clone(),
        other => panic!("{other:?}"),
    };
    let options = options.expect("options").iter().map(flower).collect();
    (read, message, options)
}

fn actions(options: &[TcFilterFlowerOption]) -> Vec<TcAction> {
    let found = options.iter().find_map(|option| match option {
        TcFilterFlowerOption::Actions(actions) => Some(actions.clone()),
        _ => None,
    });
    found.expect("actions")
}

/// Kind of an action, and type and bytes of each of its options.
fn raw(action: &TcAction) -> (String, Vec<(u16, Vec<u8>)>) {
    let mut kind = String::new();
    let mut options = Vec::new();
    for attribute in &action.attributes {
        match attribute {
            TcActionAttribute::Kind(name) => kind.clone_from(name),
            TcActionAttribute::Options(all) => {
                for option in all {
                    let mut bytes = vec![0; option.value_len()];
                    option.emit_value(&mut bytes);
                    options.push((TcActionOption::kind(option), bytes));
                }
            }
            other => panic!("{other:?}"),
        }
    }
    (kind, options)
}

#[test]
fn a_rule_has_its_name_and_its_keys() {
    use TcFilterFlowerOption as O;
    let (request, message, options) = sent(&v4());
    assert_eq!(request.header.flags, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL);
    let header = &message.header;
    assert_eq!((header.index, u32::from(header.handle), u32::from(header.parent)), (7, 0x1234, 0xffff_fff2));
    // The protocol is in network byte order.
    assert_eq!(header.info, 10 << 16 | u32::from(u16::from_ne_bytes([0x08, 0x00])));
    let expected = [
        O::EthType(0x0800),
        O::IpProto(6),
        O::Ipv4Src([10, 1, 0, 2].into()),
        O::Ipv4Dst([10, 2, 0, 2].into()),
        O::TcpSrc(40000),
        O::TcpDst(80),
        O::Flags(2),
    ];
    assert_eq!(options[..7], expected);

    let (_, message, options) = sent(&v6());
    assert_eq!(u32::from(message.header.parent), 0xffff_fff3);
    assert_eq!(message.header.info, 11 << 16 | u32::from(u16::from_ne_bytes([0x86, 0xdd])));
    assert_eq!(options[0], O::EthType(0x86dd));
    assert_eq!(options[2], O::Ipv6Src("fd00:3::2".parse().expect("an address")));
    assert_eq!(options[6], O::Flags(1));

    let (.., options) = sent(&Rule { ends: false, ..v4() });
    assert_eq!(options[6..9], [O::TcpFlags(0), O::TcpFlagsMask(0x07), O::Flags(2)]);
}

/// `struct tc_pedit_key` of a word that is replaced.
fn key(offset: u32, kept: [u8; 4], value: [u8; 4]) -> Vec<u8> {
    [kept, value, offset.to_ne_bytes(), [0; 4], [0; 4], [0; 4]].concat()
}

/// `TCA_PEDIT_KEY_EX` with a header's number and the command "set".
fn header_of(header: u16) -> Vec<u8> {
    let number = |n: u16| n.to_ne_bytes();
    let nothing = [0; 2];
    let header = [number(6), number(1), number(header), nothing];
    let command = [number(6), number(2), number(0), nothing];
    [&[number(20), number(6 | 0x8000)], &header[..], &command[..]].concat().concat()
}

#[test]
fn packets_are_edited_word_by_word() {
    let (_, _, options) = sent(&v4());
    let actions = actions(&options);
    assert_eq!(actions.iter().map(|a| a.tab).collect::<Vec<_>>(), [1, 2, 3]);
    let (kind, options) = raw(&actions[0]);
    // index, capab, action (pipe), refcnt, bindcnt; nkeys, flags.
    let head = [vec![0; 8], 3_i32.to_ne_bytes().to_vec(), vec![0; 8], vec![5, 0, 0, 0]].concat();
    let keys = [
        key(0, [0; 4], [1, 2, 3, 4]),
        key(4, [0; 4], [5, 6, 7, 8]),
        key(8, [0; 4], [9, 10, 11, 12]),
        key(16, [0; 4], [10, 3, 0, 2]),
        // The source port stays.
        key(0, [0xff, 0xff, 0, 0], [0, 0, 0x1f, 0x90]),
    ];
    assert_eq!(kind, "pedit");
    assert_eq!(options[0], (4, [head, keys.concat()].concat()));
    let headers = [1, 1, 1, 2, 4].map(header_of).concat();
    assert_eq!(options[1], (5 | 0x8000, headers));

    let (kind, options) = raw(&actions[1]);
    // IPv4's own checksum, and TCP's.
    let csum = [vec![0; 8], 3_i32.to_ne_bytes().to_vec(), vec![0; 8], 9_u32.to_ne_bytes().to_vec()].concat();
    assert_eq!((kind.as_str(), options), ("csum", vec![(1, csum)]));

    let (kind, options) = raw(&actions[2]);
    let mirred = [
        vec![0; 8],
        4_i32.to_ne_bytes().to_vec(),
        vec![0; 8],
        1_i32.to_ne_bytes().to_vec(),
        9_u32.to_ne_bytes().to_vec(),
    ];
    assert_eq!((kind.as_str(), options), ("mirred", vec![(2, mirred.concat())]));
}

#[test]
fn a_rule_that_only_rewrites_lets_packets_go_on() {
    let (_, _, options) = sent(&v6());
    let actions = actions(&options);
    assert_eq!(actions.len(), 2);
    let (_, pedit) = raw(&actions[0]);
    let keys = [
        key(8, [0; 4], [0xfd, 0, 0, 2]),
        key(12, [0; 4], [0; 4]),
        key(16, [0; 4], [0; 4]),
        key(20, [0; 4], [0, 0, 0, 2]),
        key(0, [0, 0, 0xff, 0xff], [0, 80, 0, 0]),
    ];
    assert_eq!(pedit[0].1[24..], keys.concat());
    let (_, csum) = raw(&actions[1]);
    // TC_ACT_OK, and TCP's checksum only.
    assert_eq!((&csum[0].1[8..12], &csum[0].1[20..]), (&[0; 4][..], &8_u32.to_ne_bytes()[..]));
}

#[test]
fn an_anchor_is_a_rule_for_nobody() {
    for v6 in [false, true] {
        let rule = anchor(7, Hook::Ingress, Place::Hardware, 10, v6);
        let (_, message, options) = sent(&rule);
        assert_eq!(u32::from(message.header.handle), ANCHOR);
        assert!(rule.source.ip().is_unspecified() && rule.source.port() == 0, "{rule:?}");
        assert_eq!(rule.destination, rule.source);
        // The kernel has a table of its own for each set of masks: it must be that of connections' rules.
        let connection = Rule { ends: false, ..if v6 { v6_in() } else { v4() } };
        let (.., others) = sent(&connection);
        let kinds = |options: &[TcFilterFlowerOption]| options.iter().map(Nla::kind).collect::<Vec<_>>();
        assert_eq!(kinds(&options), kinds(&others));
        let acts = |options: &[TcFilterFlowerOption]| {
            actions(options).iter().map(raw).map(|(k, _)| k).collect::<Vec<_>>()
        };
        assert_eq!(acts(&options), ["pedit", "csum", "mirred"]);
        assert_eq!(acts(&others), ["pedit", "csum", "mirred"]);
    }
}

#[test]
fn impossible_rules_are_refused() {
    let mixed = Rule { destination: v6().destination, ..v4() };
    let rewrite = Rewrite { destination: v6().rewrite.source, ..v4().rewrite };
    for rule in [mixed, Rule { rewrite, ..v4() }, Rule { handle: 0, ..v4() }, Rule { preference: 0, ..v4() }]
    {
        assert_eq!(add(&rule).map(drop), Err(Unfit), "{rule:?}");
    }
}
