//! All that can happen to one connection.

use std::time::Instant;

use super::explore::explore;
use super::*;

/// Two mishaps, or as many as `XO_SIM_FAULTS` says (three: ten minutes, 10 GB).
fn faults() -> u8 {
    u8::try_from(from_env("XO_SIM_FAULTS", 2)).expect("a few")
}

fn nothing_goes_wrong(what: &str, setup: Setup) {
    let begun = Instant::now();
    let world = if setup.guests { World::offloaded(setup) } else { World::new(setup) };
    let outcome = explore(world, None);
    let (states, quiet, took) = (outcome.states, outcome.quiet, begun.elapsed());
    println!("{what}, {} faults: {states} states, {quiet} of them quiet, {took:.1?}", setup.faults);
    if let Some((violation, moves)) = outcome.found {
        panic!("{what}: {violation}:\n{}", trace(&moves));
    }
}

#[test]
fn strict() {
    nothing_goes_wrong("strict", small(false, faults()));
    let packets = Setup { packets: 2, ..small(false, faults() - 1) };
    nothing_goes_wrong("strict, with packets", packets);
    let exec = Setup { handler: HandlerMode::Exec, packets: 1, ..small(false, faults() - 1) };
    nothing_goes_wrong("exec", exec);
}

#[test]
fn early() {
    nothing_goes_wrong("early", small(true, faults()));
    let packets = Setup { packets: 2, ..small(true, faults() - 1) };
    nothing_goes_wrong("early, with packets", packets);
}

/// With a kernel that silences what is not confirmed, a target's daemon may die at any moment.
#[test]
fn fenced_by_the_kernel() {
    let mut setup = small(true, faults() - 1);
    setup.rules.kernel_fence = true;
    nothing_goes_wrong("early, fenced by the kernel", setup);
}

/// From the first target to the second or home, each in both orders.
#[test]
fn onward_strict() {
    nothing_goes_wrong("onward, strict", onward(false, faults() - 1));
}

#[test]
fn onward_early() {
    nothing_goes_wrong("onward, early", onward(true, faults() - 1));
    let slow_packets = Setup { packets: 1, slow_packets: true, ..onward(true, 0) };
    nothing_goes_wrong("onward, with packets", slow_packets);
}
