//! The checks find what is wrong: limits that do not fit together, drivers that leave something out, and gaps that are
//! known.

use std::time::Duration;

use super::explore::explore;
use super::*;

/// The shortest way to go wrong.
fn finds(setup: Setup, expected: Violation) {
    let world = if setup.guests { World::offloaded(setup) } else { World::new(setup) };
    let outcome = explore(world, Some(expected));
    let rules = setup.rules;
    let (violation, moves) =
        outcome.found.unwrap_or_else(|| panic!("not {expected} in {} states: {rules:?}", outcome.states));
    println!(
        "{:?} {:?} {:?}: {violation} after {} states:\n{}",
        rules.limits,
        rules.flaw,
        rules.gap,
        outcome.states,
        trace(&moves)
    );
}

fn with(early: bool, faults: u8, change: impl FnOnce(&mut Rules)) -> Setup {
    let mut setup = small(early, faults);
    change(&mut setup.rules);
    setup
}

#[test]
fn a_fence_that_outlasts_the_doubt() {
    finds(with(true, 1, |r| r.limits.fence = r.limits.doubt + Duration::from_millis(100)), "two live ends");
}

#[test]
fn an_answer_that_is_believed_for_too_long() {
    let patient = |r: &mut Rules| r.timeout = Duration::from_millis(500);
    let outcome = explore(World::new(with(true, 1, patient)), None);
    assert_eq!(outcome.found, None);
    let believes =
        |r: &mut Rules| (r.timeout, r.limits.answer) = (Duration::from_millis(500), r.limits.fence * 2);
    finds(with(true, 1, believes), "reset without need");
}

#[test]
fn old_messages_that_pass_for_fresh() {
    finds(with(true, 2, |r| r.limits.fresh = r.limits.doubt), "two live ends");
}

#[test]
fn flawed_drivers() {
    for (flaw, early, faults, violation) in [
        (Flaw::StartsStale, true, 2, "two live ends"),
        (Flaw::BelievesOldQuestions, true, 2, "two live ends"),
        (Flaw::ForgetsRefusals, true, 2, "two live ends"),
        (Flaw::NoFence, true, 1, "two live ends"),
        (Flaw::ResumesAlone, true, 1, "two live ends"),
        (Flaw::IgnoresAcknowledgements, true, 1, "the client has seen another answer already"),
        (Flaw::SettlesUnseen, true, 1, "the client has seen another answer already"),
        (Flaw::ForgetsCommitment, true, 1, "the client has seen another answer already"),
        (Flaw::NeverRepeats, false, 1, "nowhere, and the client does not know"),
        (Flaw::LeavesRewrite, false, 1, "a rewrite without an owner"),
    ] {
        finds(with(early, faults, |r| r.flaw = Some(flaw)), violation);
    }
    let forgets = with(false, 0, |r| r.flaw = Some(Flaw::ForgetsHeld));
    finds(Setup { packets: 1, ..forgets }, "a packet is lost");
}

/// The probe and the question of a new channel are late alike: only older channels show it. (More mishaps than can be gone
/// through in full.)
#[test]
fn samples_by_channel() {
    for flaw in [None, Some(Flaw::SamplesByChannel)] {
        let mut world = World::new(with(true, 3, |r| r.flaw = flaw));
        let mut run = |moves: &[Move]| moves.iter().for_each(|m| world.step(*m));
        let to_target = Move::Deliver { channel: 0, end: 1 };
        let to_host = Move::Deliver { channel: 0, end: 0 };
        run(&[Move::Ask { conn: 0, from: (0, Port::Public), target: 1 }, to_target]);
        run(&[Move::Break { channel: 0, end: 0, lost: false }, to_target, Move::Tick, Move::Tick]);
        run(&[Move::Dial { from: 0, to: 1 }, to_target, to_host]);
        run(&[Move::Stall { channel: 0, end: 1 }, Move::Stall { channel: 0, end: 0 }]);
        run(&[Move::Tick; 6]);
        run(&[Move::Resume { channel: 0, end: 1 }, to_target, to_target]);
        run(&[Move::Tick; 8]);
        assert_eq!(world.violation(), flaw.map(|_| "two live ends"), "{flaw:?}");
    }
}

/// docs/PROTOCOL.md, "What the simulator checks". With the fence in the kernel the first is no gap any more.
#[test]
fn known_gaps() {
    finds(with(true, 1, |r| r.gap = Some(Gap::DiesUnconfirmed)), "two live ends");
    finds(with(false, 1, |r| r.gap = Some(Gap::SlowHandler)), "nowhere, and the client does not know");
}

/// What can be done wrongly where connections move on.
#[test]
fn flawed_moves() {
    let onward = |faults, flaw| {
        let mut setup = onward(true, faults);
        setup.rules.flaw = Some(flaw);
        setup
    };
    let packets = |setup| Setup { packets: 1, slow_packets: true, ..setup };
    finds(onward(0, Flaw::NeverAcknowledgesMoves), NEVER_ENDS);
    for flaw in [Flaw::TellsTooEarly, Flaw::NotesHomeFirst, Flaw::GivesDetoursUp] {
        let outcome = explore(World::offloaded(onward(1, flaw)), None);
        let (violation, moves) = outcome.found.unwrap_or_else(|| panic!("{flaw:?} is not found"));
        println!("{flaw:?}: {violation} after {} states:\n{}", outcome.states, trace(&moves));
    }
    let mut hasty = packets(super::onward(true, 0));
    hasty.rules.linger = hasty.rules.flight;
    finds(hasty, "a packet meets a machine without the socket");
}
