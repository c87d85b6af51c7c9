//! The simulator at work: all of a small world, walks through a large one, and worlds in which something is wrong.

use std::time::Duration;

use super::*;

mod exhaustive;
mod explore;
mod flaws;
mod random;

/// One connection, a host, a target.
fn small(early: bool, faults: u8) -> Setup {
    let rules = Rules {
        // Longer than any doubt is enough.
        restart: Duration::from_millis(650),
        late: Duration::from_millis(150),
        ..Rules::real(Duration::from_millis(50))
    };
    Setup {
        rules,
        early,
        handler: HandlerMode::Attach,
        hosts: 1,
        targets: 1,
        conns_per_host: 1,
        asks: 1,
        packets: 0,
        guests: false,
        slow_packets: false,
        swift: false,
        faults,
    }
}

/// One connection that is at the first of two targets, and moves on. Time is coarser, for there is more of everything else.
fn onward(early: bool, faults: u8) -> Setup {
    let tick = Duration::from_millis(100);
    let ready = tick * 8;
    let rules =
        Rules { restart: tick * 7, late: tick, flight: tick, linger: tick * 3, ready, ..Rules::real(tick) };
    Setup { rules, targets: 2, guests: true, swift: true, ..small(early, faults) }
}

/// What happened, a move a line; the same again and again is one line.
fn trace(moves: &[Move]) -> String {
    let runs = moves.chunk_by(|a, b| a == b);
    runs.map(|run| {
        format!(
            "    {:?}{}\n",
            run[0],
            if run.len() > 1 { format!(" x {}", run.len()) } else { String::new() }
        )
    })
    .collect()
}

fn from_env(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |n| n.parse().expect("a number"))
}
