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

fn guest(events: &[HostEvent]) -> (HostState, Vec<HostAction>) {
    let (mut m, mut all) = (Host::new(true).of_guest(), Vec::new());
    for e in events {
        m.on(e, &mut all);
    }
    (m.state(), all)
}

fn about_guest(actions: &[HostAction]) -> Vec<GuestEvent> {
    actions.iter().filter_map(|a| if let HostAction::Guest(e) = a { Some(*e) } else { None }).collect()
}

/// The machine that a guest leaves sends its packets on until its home redirects them, and for some time more.
#[test]
fn a_guest_leaves_a_detour_behind() {
    use HostAction as A;
    let left = begun_and(&[ready(true), HostEvent::Handed, HostEvent::Closed]);
    let (state, actions) = guest(&left);
    assert_eq!(state, HostState::Released);
    assert_eq!(actions.last(), Some(&A::ArmLinger));
    assert!(!actions.contains(&A::RemoveRedirect), "packets are under way");
    assert_eq!(about_guest(&actions), [GuestEvent::Left]);
    let over: Vec<_> = left.iter().cloned().chain([HostEvent::Closed, HostEvent::LingerOver]).collect();
    let (state, actions) = guest(&over);
    assert_eq!(
        (state, about_guest(&actions)),
        (HostState::Done, vec![GuestEvent::Left, GuestEvent::Released])
    );
    let end = [A::RemoveRedirect, A::SendClosedAck, A::Guest(GuestEvent::Released)];
    assert_eq!(actions[actions.len() - 3..], end);
}

/// Wherever a guest is lost, its record here hears of it, so that its home does; where it stays it hears nothing.
#[test]
fn a_guests_record_hears_what_became_of_it() {
    use HostEvent::*;
    let lost = Refused(Reason::PeerLost);
    for (events, heard) in [
        (begun_and(&[Refused(Reason::NoHandler)]), vec![]),
        (begun_and(&[Deadline, DoubtOver { served: false }]), vec![]),
        (begun_and(&[Deadline, DoubtOver { served: true }]), vec![GuestEvent::Left, GuestEvent::Lost]),
        (begun_and(&[Closed]), vec![GuestEvent::Left, GuestEvent::Lost]),
        (begun_and(&[ready(true), lost.clone()]), vec![GuestEvent::Left, GuestEvent::Lost]),
        (begun_and(&[ready(true), Handed, lost.clone()]), vec![GuestEvent::Left, GuestEvent::Lost]),
        (begun_and(&[ready(true), Handed, Closed, lost]), vec![GuestEvent::Left]),
    ] {
        let (_, actions) = guest(&events);
        assert_eq!(about_guest(&actions), heard, "{events:?}");
        assert!(about_guest(&host(true, &events).1).is_empty(), "only a guest has a record: {events:?}");
    }
}

/// A home points its redirect at the new place, or removes it when the connection is back; a guest's host does neither.
#[test]
fn a_home_follows_its_connection() {
    let elsewhere: SocketAddr = "10.4.0.2:80".parse().expect("an address");
    let moved = begun_and(&[ready(true), HostEvent::Moved(elsewhere)]);
    let (state, actions) = host(true, &moved);
    assert_eq!((state, actions.last()), (HostState::Offloaded, Some(&HostAction::Repoint(elsewhere))));
    assert!(!guest(&moved).1.contains(&HostAction::Repoint(elsewhere)));
    let back = begun_and(&[ready(true), HostEvent::Handed, HostEvent::Returned]);
    let (state, actions) = host(true, &back);
    assert_eq!((state, actions.last()), (HostState::Done, Some(&HostAction::RemoveRedirect)));
    assert_eq!(guest(&back).0, HostState::Offloaded);
}

#[test]
fn what_a_target_keeps_of_a_guest_that_left() {
    use TargetAction as A;
    use TargetEvent as E;
    let served = [E::Begin, E::Restored(Ok(())), E::Handed(Ok(())), E::HostReady];
    let run = |more: &[GuestEvent], then: &[TargetEvent]| {
        let more = more.iter().map(|e| E::Guest(*e));
        let events: Vec<_> = served.iter().cloned().chain(more).chain(then.iter().cloned()).collect();
        let (state, actions) = target(true, &events);
        (state, actions[6..].to_vec())
    };
    let left = GuestEvent::Left;
    assert_eq!(
        run(&[left], &[E::SocketGone]),
        (TargetState::Left, vec![A::NoteLeft]),
        "its end is another's"
    );
    assert_eq!(run(&[left], &[E::HostReady]).1, [A::NoteLeft, A::SendHanded]);
    assert_eq!(
        run(&[left, GuestEvent::Released], &[]),
        (TargetState::Done, vec![A::NoteLeft, A::RemoveRewrite])
    );
    assert_eq!(
        run(&[left, GuestEvent::Lost], &[E::ClosedAck]),
        (TargetState::Done, vec![A::NoteLeft, A::SendClosed, A::RemoveRewrite])
    );
    assert_eq!(run(&[], &[E::Home]), (TargetState::Done, vec![A::RemoveRewrite]));
}

#[test]
fn a_shortcut_is_told_until_both_have_heard() {
    use ShortcutAction as A;
    use ShortcutEvent as E;
    let mut direct = Shortcut::new(false);
    for event in [E::Confirmed, E::HomeBack, E::MovedAck, E::ViaBack, E::Released, E::GiveUp] {
        assert_eq!(direct.on(event), None, "there is no detour: {event:?}");
    }
    let run = |events: &[ShortcutEvent]| {
        let mut s = Shortcut::new(true);
        let actions: Vec<_> = events.iter().filter_map(|e| s.on(*e)).collect();
        (s.state(), actions)
    };
    assert_eq!(
        run(&[E::HomeBack, E::MovedAck, E::GiveUp]),
        (ShortcutState::Waiting, vec![]),
        "not confirmed"
    );
    let (state, actions) =
        run(&[E::Confirmed, E::ViaBack, E::HomeBack, E::MovedAck, E::HomeBack, E::ViaBack]);
    assert_eq!(state, ShortcutState::Releasing);
    assert_eq!(actions, [A::SendMoved, A::SendMoved, A::SendClosed, A::SendClosed]);
    for last in [E::Released, E::GiveUp] {
        let (state, actions) = run(&[E::Confirmed, E::MovedAck, last, last]);
        assert_eq!((state, actions), (ShortcutState::Done, vec![A::SendMoved, A::SendClosed, A::Close]));
    }
}
