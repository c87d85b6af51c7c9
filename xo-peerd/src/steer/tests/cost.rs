//! What steering costs: `bench/wrk/run --steering` runs these and reads the lines that begin with `row `. Nothing is
//! asserted about times.

use std::hint::black_box;
use std::time::{Duration, Instant};

use aya::programs::{TestRun, TestRunOptions};

use super::super::*;
use super::bench::{Bench, owner};
use super::frame::frame;
use super::tap::alone;
use super::veth::{Sender, Veth};

const FLOW: u64 = 7;
/// Of a test run: long enough that its start does not count.
const REPEAT: u32 = 1_000_000;

fn row(what: &str, unit: &str, value: f64) {
    println!("row {{\"what\": \"{what}\", \"unit\": \"{unit}\", \"value\": {value:.2}}}");
}

fn key() -> FlowKey {
    flow_key("192.0.2.7:40000".parse().expect("an address"), "10.2.0.2:80".parse().expect("an address"))
}

fn target() -> SocketAddr {
    "10.3.0.2:8080".parse().expect("an address")
}

fn packet(length: usize, port: u16) -> Vec<u8> {
    let data = length - 54;
    frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 ttl=255 | tcp {port} > 80 A | fill {data}"))
}

/// Nanoseconds of one run. The frame is the same one each time: a rewritten one meets its own result, so what is measured
/// as a hit is a flow whose packets do not change, but for the work.
fn run(bench: &mut Bench, name: &str, frame: &[u8]) -> f64 {
    let mut options = TestRunOptions::new();
    options.data_in = Some(frame);
    options.repeat = REPEAT;
    let program = classifier(&mut bench.steer.programs, name).expect("the program");
    let result = program.test_run(options).unwrap_or_else(|e| panic!("{}", chain(&e)));
    result.duration.as_nanos() as f64
}

#[test]
#[ignore = "a measurement: bench/wrk/run --steering"]
fn programs() {
    let mut bench = Bench::new();
    let miss = run(&mut bench, INGRESS_PROGRAM, &packet(64, 40001));
    row("ingress program, unknown flow", "ns", miss);
    let miss = run(&mut bench, EGRESS_PROGRAM, &frame("eth | v4 10.2.0.2 > 192.0.2.7 | tcp 80 > 40000 A"));
    row("egress program, unknown flow", "ns", miss);
    let udp =
        run(&mut bench, INGRESS_PROGRAM, &frame("eth | v4 192.0.2.7 > 10.2.0.2 | udp 40000 > 80 | fill 20"));
    row("ingress program, UDP", "ns", udp);
    // To the address it has already: found again after each rewrite.
    let same: SocketAddr = "10.2.0.2:80".parse().expect("an address");
    bench.steer.deliver(&key(), FLOW, 0, same).expect("an entry");
    let hit = run(&mut bench, INGRESS_PROGRAM, &packet(64, 40000));
    row("ingress program, known flow: counted and rewritten", "ns", hit);
    bench.steer.rewrite(&key(), &owner(FLOW), same).expect("an entry");
    let hit = run(&mut bench, EGRESS_PROGRAM, &frame("eth | v4 10.2.0.2 > 192.0.2.7 | tcp 80 > 40000 A"));
    row("egress program, known flow: counted and rewritten", "ns", hit);
}

#[test]
#[ignore = "a measurement: bench/wrk/run --steering"]
fn rules() {
    const ROUNDS: u32 = 20_000;
    let mut steer = Bench::with(65_536, 1 << 20).steer;
    let keys: Vec<_> = (0..ROUNDS)
        .map(|i| {
            let mut key = key();
            key.remote_port = i as u16;
            key
        })
        .collect();
    let mut spent: [Vec<Duration>; 5] = Default::default();
    for key in &keys {
        let mut time = |step: usize, work: &mut dyn FnMut()| {
            let begun = Instant::now();
            work();
            spent[step].push(begun.elapsed());
        };
        time(0, &mut || steer.hold(key, FLOW, 0).expect("an entry"));
        time(1, &mut || steer.redirect(key, FLOW, (0, 1), target()).expect("the flip"));
        time(2, &mut || assert!(black_box(steer.remove_flow(key, FLOW)).expect("the map")));
        time(3, &mut || steer.rewrite(key, &owner(FLOW), target()).expect("an entry"));
        time(4, &mut || assert!(black_box(steer.remove_rewrite(key, FLOW)).expect("the map")));
    }
    let names = ["hold", "redirect", "remove the flow", "source rewrite", "remove the rewrite"];
    for (name, spent) in names.into_iter().zip(spent) {
        let micros = spent.iter().map(|spent| spent.as_secs_f64() * 1e6);
        row(name, "us", median(micros.collect()));
    }
}

/// Of a call or a while in which nobody else had the processor.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[values.len() / 2]
}

/// One processor sends, steers and sends on, and receives what is sent on; what sending alone costs is told too.
#[test]
#[ignore = "a measurement: bench/wrk/run --steering"]
fn packets() {
    const ROUNDS: usize = 100;
    const PACKETS: usize = 20_000;
    alone(|| {
        let mut veth = Veth::up();
        veth.steer.hold(&key(), FLOW, 0).expect("an entry");
        veth.steer.redirect(&key(), FLOW, (0, 1), target()).expect("the flip");
        for length in [64, 1500] {
            let whole = packet(length, 40000);
            let mut doomed = whole.clone();
            // Its time to live.
            doomed[22] = 1;
            let kinds = [
                ("sent, and dropped by the program", &doomed, Path::Expired, false),
                ("sent and redirected, the kernel looks for the route", &whole, Path::Redirected, false),
                ("sent and redirected, the route is known", &whole, Path::Redirected, true),
            ];
            let mut rates: [Vec<f64>; 3] = Default::default();
            // In turns: all of them have the same neighbours on the machine.
            for _ in 0..ROUNDS {
                for ((_, frame, path, known), rates) in kinds.iter().zip(&mut rates) {
                    if *known {
                        veth.steer.refresh_ways();
                    } else {
                        veth.steer.ways.forget();
                    }
                    let before = veth.steer.counters()[*path as usize];
                    let spent = Sender::new(frame).send(PACKETS);
                    let packets = veth.steer.counters()[*path as usize] - before;
                    rates.push(packets as f64 / spent.as_secs_f64());
                }
            }
            for ((what, ..), rates) in kinds.iter().zip(rates) {
                row(&format!("{what}, {length} B"), "packets/s", median(rates));
            }
        }
    });
}
