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
    let outcome = explore(World::new(setup), None);
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
