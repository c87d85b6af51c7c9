//! The daemon's side of the maps: who owns an entry, how many there are, what a load refuses.

use xo_bpf_abi::{FLAG_CLIENT_FIN, FLAG_CLIENT_RST, FLAG_PASS, FLAG_RULE};

use super::super::*;
use super::bench::{Bench, Hook, Verdict, owner};
use super::frame::frame;

fn key(client_port: u16) -> FlowKey {
    flow_key(SocketAddr::from(([192, 0, 2, 7], client_port)), SocketAddr::from(([10, 2, 0, 2], 80)))
}

fn target() -> SocketAddr {
    SocketAddr::from(([10, 3, 0, 2], 8080))
}

#[test]
fn only_what_was_removed_is_counted_out() {
    let mut steer = Bench::new().steer;
    steer.hold(&key(1), 7, 0).expect("an entry");
    steer.hold(&key(2), 8, 0).expect("an entry");
    steer.rewrite(&key(1), &owner(7), target()).expect("an entry");
    assert_eq!(steer.flow_entries(), 3);
    for (what, removed) in [
        ("another's flow entry", steer.remove_flow(&key(1), 8)),
        ("no flow entry", steer.remove_flow(&key(3), 7)),
        ("another's rewrite", steer.remove_rewrite(&key(1), 8)),
        ("no rewrite", steer.remove_rewrite(&key(2), 8)),
    ] {
        assert!(!removed.expect("the map"), "{what}");
    }
    assert_eq!(steer.flow_entries(), 3);
    assert!(steer.flow(&key(1)).is_some() && steer.rewrite_entry(&key(1)).is_some());
    assert!(steer.remove_flow(&key(1), 7).expect("the map"));
    assert_eq!((steer.flow(&key(1)), steer.flow_entries()), (None, 2));
    assert!(!steer.remove_flow(&key(1), 7).expect("the map"), "twice");
    assert_eq!(steer.flow_entries(), 2);
    assert!(steer.remove_rewrite(&key(1), 7).expect("the map"));
    assert_eq!((steer.rewrite_entry(&key(1)), steer.flow_entries()), (None, 1));
    assert!(!steer.remove_rewrite(&key(1), 7).expect("the map"), "twice");
    assert!(steer.remove_flow(&key(2), 8).expect("the map"));
    assert_eq!(steer.flow_entries(), 0);
}

#[test]
fn what_the_program_removed_is_counted_out_once() {
    let mut bench = Bench::new();
    bench.steer.hold(&key(40000), 7, 0).expect("an entry");
    bench.steer.hold(&key(40001), 8, 0).expect("an entry");
    for flags in ["R", "S"] {
        bench.run(Hook::Ingress, &frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 {flags}")));
    }
    assert_eq!(bench.paths(), [("held", 1), ("reused", 1)]);
    assert_eq!((bench.steer.flow(&key(40000)), bench.steer.flow_entries()), (None, 1));
    assert!(!bench.steer.remove_flow(&key(40000), 7).expect("the map"), "the program was first");
    assert_eq!(bench.steer.flow_entries(), 1);
    // The port's next connection moves as well.
    bench.steer.hold(&key(40000), 9, 0).expect("an entry");
    assert_eq!(bench.steer.flow_entries(), 2);
}

#[test]
fn a_flow_with_a_rule_is_left_to_it_and_kept_until_it_is_gone() {
    let mut bench = Bench::new();
    let run = |bench: &mut Bench, flags: &str| {
        bench.run(Hook::Ingress, &frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 {flags}")))
    };
    bench.steer.hold(&key(40000), 7, 0).expect("an entry");
    assert!(bench.steer.mark_rule(&key(40000), 7, FLAG_RULE).is_err(), "a held flow has no rule");
    bench.steer.redirect(&key(40000), 7, (0, 1), target()).expect("the flip");
    assert!(matches!(bench.steer.mark_rule(&key(40000), 8, FLAG_RULE), Err(SteerError::NotOurs)));
    // A NIC's rule: what it has not taken is redirected.
    bench.steer.mark_rule(&key(40000), 7, FLAG_RULE).expect("an entry");
    run(&mut bench, "A");
    assert_eq!(bench.paths(), [("redirected", 1)]);
    // The kernel's: only what begins or ends a connection is.
    bench.steer.mark_rule(&key(40000), 7, FLAG_RULE | FLAG_PASS).expect("an entry");
    for flags in ["A", "PA", "FA"] {
        run(&mut bench, flags);
    }
    let seen = bench.steer.flow(&key(40000)).expect("an entry");
    assert_eq!((seen.packets, seen.flags), (2, FLAG_CLIENT_FIN | FLAG_RULE | FLAG_PASS));
    // The port is used again: not yet.
    run(&mut bench, "S");
    assert_eq!(bench.paths(), [("redirected", 2), ("left_to_rule", 2), ("reuse_dropped", 1)]);
    bench.steer.mark_rule(&key(40000), 7, 0).expect("an entry");
    let seen = bench.steer.flow(&key(40000)).expect("an entry");
    assert_eq!((seen.packets, seen.flags), (2, FLAG_CLIENT_FIN), "what was seen stays known");
    run(&mut bench, "S");
    assert_eq!(bench.steer.flow(&key(40000)), None);
}

/// What is redirected must not overtake what was held before it.
#[test]
fn a_flow_is_redirected_once_what_was_held_has_gone() {
    let mut bench = Bench::new();
    let run = |bench: &mut Bench, port: u16| {
        bench.run(Hook::Ingress, &frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp {port} > 80 PA"))).0
    };
    bench.steer.hold(&key(40000), 7, 0).expect("an entry");
    assert_eq!(run(&mut bench, 40000), Verdict::Drop);
    bench.steer.redirect(&key(40000), 7, (0, 1), target()).expect("the flip");
    assert_eq!(run(&mut bench, 40000), Verdict::Drop, "it queues");
    assert_eq!(bench.held().len(), 2);
    assert_eq!(run(&mut bench, 40000), Verdict::Redirect);
    assert_eq!(bench.steer.flow(&key(40000)).expect("an entry").ordered_until_ns, 0);
    // From here on others' packets are nothing to it.
    bench.steer.hold(&key(40001), 8, 0).expect("an entry");
    assert_eq!(run(&mut bench, 40001), Verdict::Drop);
    assert_eq!(run(&mut bench, 40000), Verdict::Redirect);
    assert_eq!(bench.paths(), [("held", 3), ("redirected", 2)]);
    // A daemon that does not come keeps nobody waiting.
    bench.steer.redirect(&key(40001), 8, (0, 1), target()).expect("the flip");
    let until = bench.steer.flow(&key(40001)).expect("an entry").ordered_until_ns;
    assert!(now_ns() < until);
    std::thread::sleep(ORDERED_FOR);
    assert_eq!(run(&mut bench, 40001), Verdict::Redirect);
}

/// Others may have filled the ring.
#[test]
fn a_redirected_flow_that_has_no_room_to_queue_goes_its_way() {
    let mut bench = Bench::with(4, 4096);
    let sent = |port: u16| frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp {port} > 80 PA | fill 900"));
    for port in [40000, 40001] {
        bench.steer.hold(&key(port), port.into(), 0).expect("an entry");
    }
    for _ in 0..5 {
        assert_eq!(bench.run(Hook::Ingress, &sent(40001)).0, Verdict::Drop);
    }
    assert!(bench.paths().iter().any(|(path, n)| *path == "hold_dropped" && *n > 0), "{:?}", bench.paths());
    bench.steer.redirect(&key(40000), 40000, (0, 1), target()).expect("the flip");
    assert_eq!(bench.run(Hook::Ingress, &sent(40000)).0, Verdict::Redirect);
    assert_ne!(
        bench.steer.flow(&key(40000)).expect("an entry").ordered_until_ns,
        0,
        "there is room again soon"
    );
}

#[test]
fn an_entry_has_one_owner() {
    let mut steer = Bench::new().steer;
    steer.hold(&key(1), 7, 0).expect("an entry");
    steer.rewrite(&key(1), &owner(7), target()).expect("an entry");
    assert!(matches!(steer.hold(&key(1), 8, 0), Err(SteerError::Exists)));
    assert!(matches!(steer.hold(&key(1), 7, 0), Err(SteerError::Exists)), "not even twice by its owner");
    assert!(matches!(steer.rewrite(&key(1), &owner(8), target()), Err(SteerError::Exists)));
    assert!(matches!(steer.redirect(&key(1), 8, (0, 1), target()), Err(SteerError::NotOurs)));
    assert!(
        matches!(steer.redirect(&key(2), 7, (0, 1), target()), Err(SteerError::NotOurs)),
        "there is none"
    );
    let entry = steer.flow(&key(1)).expect("the entry");
    assert_eq!((entry.flow_id, entry.action), (7, Action::Hold as u32));
    assert_eq!(steer.flow_entries(), 2);
}

#[test]
fn a_full_table_refuses() {
    let mut steer = Bench::with(2, 4096).steer;
    for port in [1, 2] {
        steer.hold(&key(port), 7, 0).expect("room");
        steer.rewrite(&key(port), &owner(7), target()).expect("room");
    }
    assert!(matches!(steer.hold(&key(3), 7, 0), Err(SteerError::Full)));
    assert!(matches!(steer.rewrite(&key(3), &owner(7), target()), Err(SteerError::Full)));
    assert_eq!(steer.flow_entries(), 4);
    assert!(steer.flow(&key(1)).is_some() && steer.flow(&key(2)).is_some(), "nobody was evicted");
    steer.redirect(&key(1), 7, (0, 1), target()).expect("an update needs no room");
    assert!(steer.remove_flow(&key(2), 7).expect("the map"));
    steer.hold(&key(3), 7, 0).expect("room again");
    assert_eq!(steer.flow_entries(), 4);
}

/// A FIN that was held is replayed to the target: the redirect must know of it.
#[test]
fn a_redirect_knows_how_the_client_closed() {
    for (flags, expected) in [("FA", FLAG_CLIENT_FIN), ("R", FLAG_CLIENT_RST), ("A", 0)] {
        let mut bench = Bench::new();
        bench.steer.hold(&key(40000), 7, 0).expect("an entry");
        bench.run(Hook::Ingress, &frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 {flags}")));
        let last_ns = bench.steer.flow(&key(40000)).expect("the entry").last_ns;
        assert_eq!(bench.held().len(), 1);
        bench.steer.redirect(&key(40000), 7, (0, 1), target()).expect("the flip");
        let entry = bench.steer.flow(&key(40000)).expect("the entry");
        let state = (entry.action, entry.flags, entry.packets, entry.bytes, entry.last_ns);
        assert_eq!(state, (Action::Redirect as u32, expected, 0, 0, last_ns), "{flags}");
        let syn = frame("eth | v4 192.0.2.7 > 10.2.0.2 | tcp 40000 > 80 S");
        let verdict = if expected == 0 { Verdict::Redirect } else { Verdict::Pass };
        assert_eq!(bench.run(Hook::Ingress, &syn).0, verdict, "{flags}");
    }
}

#[test]
fn keys_are_in_network_order_and_mapped() {
    let v4 = key(0x1234);
    let remote = u32::from_ne_bytes([192, 0, 2, 7]);
    assert_eq!(v4.remote, [0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), remote]);
    assert_eq!((v4.remote_port.to_ne_bytes(), v4.local_port.to_ne_bytes()), ([0x12, 0x34], [0, 80]));
    let address = |text: &str| -> SocketAddr { text.parse().expect("an address") };
    let mapped = flow_key(address("[::ffff:192.0.2.7]:4660"), address("[::ffff:10.2.0.2]:80"));
    assert_eq!(mapped, v4);
    let v6 = flow_key(address("[2001:db8::7]:1"), address("[fd00:2::2]:2"));
    assert_eq!(v6.remote[0], u32::from_ne_bytes([0x20, 0x01, 0x0d, 0xb8]));
    assert_eq!(v6.local[3], u32::from_ne_bytes([0, 0, 0, 2]));
}

#[test]
fn what_cannot_be_loaded_says_why() {
    let error = Steer::load(&[], Sizes { flows: 0, ring: 4096 }, None)
        .err()
        .expect("tables without entries")
        .to_string();
    assert!(error.starts_with("loading the BPF programs: "), "{error}");
    let error = Steer::load(&["no-such0".into()], Sizes { flows: 64, ring: 4096 }, None)
        .err()
        .expect("no interface")
        .to_string();
    assert!(error.starts_with("interface no-such0: "), "{error}");
}

/// What the stack says of a connection that has left is not for its client; what the daemon says is.
#[test]
fn a_reset_of_a_connection_that_has_left_is_muted() {
    let mut bench = Bench::new();
    let out = |flags: &str| frame(&format!("eth | v4 10.2.0.2 > 192.0.2.7 | tcp 80 > 40000 {flags}"));
    bench.steer.hold(&key(40000), 7, 0).expect("an entry");
    assert_eq!(bench.run(Hook::Egress, &out("R")).0, Verdict::Pass, "held: it is still here");
    bench.steer.redirect(&key(40000), 7, (0, 1), target()).expect("the flip");
    assert_eq!(bench.run(Hook::Egress, &out("R")).0, Verdict::Drop);
    assert_eq!(bench.run(Hook::Egress, &out("RA")).0, Verdict::Drop);
    assert_eq!(bench.run(Hook::Egress, &out("A")).0, Verdict::Pass);
    assert!(bench.steer.remove_flow(&key(40000), 7).expect("the map"));
    assert_eq!(bench.run(Hook::Egress, &out("R")).0, Verdict::Pass);
    bench.steer.rewrite(&key(40000), &owner(7), target()).expect("an entry");
    for left in [false, true, false] {
        bench.steer.note_left(&key(40000), 7, left).expect("the entry");
        let verdict = if left { Verdict::Drop } else { Verdict::Pass };
        assert_eq!(bench.run(Hook::Egress, &out("R")).0, verdict, "left: {left}");
    }
    assert_eq!(bench.steer.counters()[Path::Muted as usize], 3);
}
