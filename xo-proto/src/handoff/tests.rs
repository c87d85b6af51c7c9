use super::*;
use crate::reason::Reason;
use std::net::SocketAddr;

fn local() -> SocketAddr {
    "10.3.0.2:80".parse().expect("an address")
}

fn host(early: bool, events: &[HostEvent]) -> (HostState, Vec<HostAction>) {
    let (mut m, mut all) = (Host::new(early), Vec::new());
    for e in events {
        m.on(e, &mut all);
    }
    (m.state(), all)
}

fn target(early: bool, events: &[TargetEvent]) -> (TargetState, Vec<TargetAction>) {
    let (mut m, mut all) = (Target::new(early), Vec::new());
    for e in events {
        m.on(e, &mut all);
    }
    (m.state(), all)
}

fn ready(started: bool) -> HostEvent {
    HostEvent::TargetReady { local: local(), started, timely: true }
}

fn begun_and(more: &[HostEvent]) -> Vec<HostEvent> {
    let begun = [HostEvent::Start, HostEvent::Held(Ok(())), HostEvent::Dumped(Ok(()))];
    begun.into_iter().chain(more.iter().cloned()).collect()
}

#[test]
fn host_sends_the_papers_order() {
    for early in [false, true] {
        let events = begun_and(&[ready(early), HostEvent::Handed, HostEvent::Closed]);
        let (state, actions) = host(early, &events);
        assert_eq!(state, HostState::Done);
        use HostAction::*;
        assert_eq!(
            actions,
            [Hold, Dump, SendBegin, Redirect(local()), SendHostReady, Vacate, RemoveRedirect, SendClosedAck]
        );
    }
}

/// Every way to fail before the redirect ends with the socket taken back and one verdict.
#[test]
fn strict_host_takes_back_until_it_redirects() {
    use HostEvent::*;
    for (event, reason) in [
        (Refused(Reason::NoHandler), Reason::NoHandler),
        (Deadline, Reason::PeerTimeout),
        (PeerLost, Reason::PeerLost),
    ] {
        let (state, actions) = host(false, &begun_and(&[event.clone(), ready(false), Handed, PeerBack]));
        assert_eq!(state, HostState::Done, "{event:?}");
        assert_eq!(actions.iter().filter(|a| **a == HostAction::TakeBack).count(), 1, "{event:?}");
        assert_eq!(actions.last(), Some(&HostAction::Stay(reason)), "{event:?}");
        assert!(!actions.contains(&HostAction::Vacate), "{event:?}");
    }
}

#[test]
fn early_host_in_doubt_waits_and_asks() {
    use HostAction as A;
    use HostEvent::*;
    let tail = |events: &[HostEvent]| {
        let (state, actions) = host(true, &begun_and(events));
        (state, actions[3..].to_vec())
    };
    let doubt = [A::ArmDoubt, A::SendQuery];
    let back = [A::TakeBack, A::Stay(Reason::Closed)];
    assert_eq!(tail(&[Deadline, PeerLost]), (HostState::Doubt, doubt.to_vec()));
    assert_eq!(tail(&[PeerLost, PeerBack]), (HostState::Doubt, doubt.to_vec()));
    assert_eq!(
        tail(&[Deadline, Refused(Reason::Closed)]),
        (HostState::Done, doubt.iter().chain(&back).cloned().collect())
    );
    let (state, actions) = tail(&[Deadline, DoubtOver { served: false }, ready(true)]);
    assert_eq!((state, actions[2..].to_vec()), {
        (HostState::Done, vec![A::SendAbort, A::TakeBack, A::Stay(Reason::PeerTimeout)])
    });
    let (state, actions) = tail(&[Deadline, DoubtOver { served: true }]);
    assert_eq!((state, actions[2..].to_vec()), (HostState::Done, vec![A::SendAbort, A::Vacate, A::Reset]));
    // An answer that is too old is not acted upon, but asked for again.
    let late = TargetReady { local: local(), started: true, timely: false };
    assert_eq!(tail(std::slice::from_ref(&late)), (HostState::Doubt, doubt.to_vec()));
    let (state, actions) = tail(&[late.clone(), late, ready(true)]);
    assert_eq!(state, HostState::Redirected);
    assert_eq!(
        actions,
        [A::ArmDoubt, A::SendQuery, A::SendQuery, A::Redirect(local()), A::SendHostReady, A::Vacate]
    );
}

#[test]
fn host_resets_what_the_target_lost() {
    let events = begun_and(&[
        ready(false),
        HostEvent::PeerLost,
        HostEvent::PeerBack,
        HostEvent::Refused(Reason::PeerLost),
    ]);
    let (state, actions) = host(false, &events);
    assert_eq!(state, HostState::Done);
    assert_eq!(actions[actions.len() - 2..], [HostAction::SendHostReady, HostAction::Reset]);
}

/// CLOSED may be lost with a channel, and the target may have forgotten the connection since.
#[test]
fn host_asks_again_about_what_it_has_offloaded() {
    use HostAction as A;
    use HostEvent::*;
    let offloaded = [ready(false), Handed, PeerLost, PeerBack];
    let (state, actions) = host(false, &begun_and(&offloaded));
    assert_eq!((state, actions.last()), (HostState::Offloaded, Some(&A::SendHostReady)));
    let (state, actions) = host(true, &begun_and(&[Deadline, Closed]));
    let told = [A::Vacate, A::Reset, A::SendClosedAck];
    assert_eq!((state, &actions[actions.len() - 3..]), (HostState::Done, &told[..]));
}

#[test]
fn target_that_is_asked_about_the_end_says_it_again() {
    use TargetEvent::*;
    let gone = [Begin, Restored(Ok(())), HostReady, Handed(Ok(())), SocketGone];
    for question in [Query, HostReady, PeerBack] {
        let events: Vec<_> = gone.iter().cloned().chain([question]).collect();
        let (state, actions) = target(false, &events);
        assert_eq!((state, actions.last()), (TargetState::Closing, Some(&TargetAction::SendClosed)));
    }
}

#[test]
fn strict_target_starts_only_after_host_ready() {
    use TargetEvent::*;
    let (state, actions) = target(
        false,
        &[Begin, Restored(Ok(())), Begin, HostReady, HostReady, Handed(Ok(())), SocketGone, ClosedAck],
    );
    assert_eq!(state, TargetState::Done);
    use TargetAction as A;
    assert_eq!(
        actions,
        [
            A::Restore,
            A::SendReady,
            A::SendReady,
            A::Start,
            A::SendHanded,
            A::Confirmed,
            A::SendClosed,
            A::RemoveRewrite
        ]
    );
    let (state, actions) = target(false, &[Begin, Restored(Ok(())), Abort, HostReady]);
    assert_eq!((state, actions.last()), (TargetState::Done, Some(&A::Discard)));
}

#[test]
fn early_target_starts_at_once_and_gives_up_what_is_not_confirmed() {
    use TargetAction as A;
    use TargetEvent::*;
    let started = [Begin, Restored(Ok(())), Handed(Ok(()))];
    let run = |more: &[TargetEvent]| {
        let events: Vec<_> = started.iter().chain(more).cloned().collect();
        let (state, actions) = target(true, &events);
        assert_eq!(actions[..3], [A::Restore, A::Start, A::SendStarted]);
        (state, actions[3..].to_vec())
    };
    assert_eq!(run(&[HostReady]), (TargetState::Served, vec![A::Keep, A::SendHanded, A::Confirmed]));
    assert_eq!(run(&[Fence { acknowledged: false }]), (TargetState::Done, vec![A::Withdraw]));
    assert_eq!(run(&[Fence { acknowledged: true }]), (TargetState::Served, vec![A::Keep, A::Confirmed]));
    assert_eq!(run(&[Abort, HostReady]), (TargetState::Done, vec![A::Withdraw]));
    assert_eq!(run(&[Query]), (TargetState::Unconfirmed, vec![A::SendStarted]));
    assert_eq!(run(&[HostReady, Fence { acknowledged: false }]).0, TargetState::Served);
    assert_eq!(run(&[SocketGone, ClosedAck]).0, TargetState::Done);
}

/// Small model, all orders: whatever the host is told, in any order of six events, it never vacates its
/// socket after taking it back, and tells the library one verdict at the most.
#[test]
fn no_order_of_events_makes_two_ends() {
    use HostEvent as E;
    let alphabet = [
        E::Start,
        E::Held(Ok(())),
        E::Dumped(Ok(())),
        ready(true),
        ready(false),
        E::Refused(Reason::NoHandler),
        E::Deadline,
        E::DoubtOver { served: false },
        E::PeerLost,
        E::Handed,
        E::Closed,
    ];
    for early in [false, true] {
        let mut index = [0_usize; 6];
        loop {
            let events: Vec<_> = index.iter().map(|&i| alphabet[i].clone()).collect();
            let (_, actions) = host(early, &events);
            let taken = actions.iter().position(|a| *a == HostAction::TakeBack);
            let vacated = actions.iter().position(|a| *a == HostAction::Vacate);
            assert!(taken.is_none() || vacated.is_none(), "{events:?}: {actions:?}");
            let verdicts =
                actions.iter().filter(|a| matches!(a, HostAction::Stay(_) | HostAction::Vacate)).count();
            assert!(verdicts <= 1, "{events:?}: {actions:?}");
            let Some(i) = index.iter().rposition(|&i| i + 1 < alphabet.len()) else { break };
            index[i] += 1;
            index[i + 1..].fill(0);
        }
    }
}
