//! The two state machines of a hand-off and their drivers, in the simulator of `xo_proto::handoff::sim`.
//!
//! Input: two bytes for the world, then two bytes for each thing that happens. Whatever it is and in which order, what the
//! simulator checks must hold.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use xo_proto::handoff::sim::{HandlerMode, Rules, Setup, World};

fn setup(shape: u8, faults: u8) -> Setup {
    let bit = |n: u8| shape >> n & 1;
    Setup {
        rules: Rules { late: Duration::from_millis(20), ..Rules::real(Duration::from_millis(10)) },
        early: bit(0) == 1,
        handler: if bit(1) == 1 { HandlerMode::Exec } else { HandlerMode::Attach },
        hosts: 1 + usize::from(bit(2)),
        targets: 1 + usize::from(bit(3)),
        conns_per_host: 1 + usize::from(bit(4)),
        asks: 1 + bit(5),
        packets: 2 * bit(6),
        guests: bit(7) == 1,
        slow_packets: bit(7) == 1,
        swift: false,
        faults: faults & 15,
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&[shape, faults], choices)) = data.split_first_chunk() else { return };
    let mut world = World::new(setup(shape, faults));
    for choice in choices.as_chunks().0 {
        world.step(world.pick(u16::from_be_bytes(*choice)));
        assert_eq!(world.violation(), None, "{world:?}");
    }
    world.settle();
    assert_eq!(world.violation(), None, "{world:?}");
});
