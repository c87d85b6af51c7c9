//! Walks through a large world: several machines and connections, many mishaps, time in small steps.

use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use super::*;

/// `XO_SIM_CASES` walks; `XO_SIM_SEED` chooses which.
fn config() -> (Config, u64) {
    let seed = match std::env::var("XO_SIM_SEED") {
        Ok(seed) => seed.parse().expect("a number"),
        Err(_) => std::time::UNIX_EPOCH.elapsed().map_or(0, |t| t.as_nanos() as u64),
    };
    let config = Config {
        cases: from_env("XO_SIM_CASES", 400),
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(seed),
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    (config, seed)
}

fn large() -> impl Strategy<Value = Setup> {
    let kinds = (any::<bool>(), any::<bool>(), any::<bool>());
    (kinds, 1..=2_usize, 1..=2_usize, 1..=3_usize, 0..=8_u8).prop_map(
        |((early, exec, guests), hosts, targets, conns_per_host, faults)| Setup {
            rules: Rules { late: Duration::from_millis(20), ..Rules::real(Duration::from_millis(10)) },
            early,
            handler: if exec { HandlerMode::Exec } else { HandlerMode::Attach },
            hosts,
            targets,
            conns_per_host,
            asks: if guests { 6 } else { 3 },
            packets: 4,
            guests,
            slow_packets: guests,
            swift: false,
            faults,
        },
    )
}

#[test]
fn nothing_goes_wrong() {
    let (config, seed) = config();
    println!("XO_SIM_SEED={seed} XO_SIM_CASES={}", config.cases);
    let mut runner = TestRunner::new(config);
    let walks = (large(), prop::collection::vec(any::<u16>(), 0..600));
    let outcome = runner.run(&walks, |(setup, choices)| {
        let mut world = World::new(setup);
        let mut moves = Vec::new();
        for choice in choices {
            if world.violation().is_some() {
                break;
            }
            let next = world.pick(choice);
            moves.push(next);
            world.step(next);
        }
        moves.extend(world.settle());
        match world.violation() {
            Some(violation) => Err(TestCaseError::fail(format!("{violation}:\n{}", trace(&moves)))),
            None => Ok(()),
        }
    });
    if let Err(e) = outcome {
        panic!("XO_SIM_SEED={seed}: {e}");
    }
}
