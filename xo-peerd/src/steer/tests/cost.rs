//! What steering costs: `bench/wrk/run --steering` runs these and reads the lines that begin with `row `. Nothing is
//! asserted about times.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aya::programs::{TestRun, TestRunOptions};

use super::super::*;
use super::bench::{Bench, INGRESS, owner, redirect_unordered};
use super::frame::frame;
use super::tap::alone;
use super::veth::{Sender, Veth, receive_offload};

const FLOW: u64 = 7;
/// Of a test run: long enough that its start does not count.
const REPEAT: u32 = 1_000_000;

/// Turns of a measurement that takes its time: a fifth with `XO_COST=short`.
fn turns(all: usize) -> usize {
    if std::env::var_os("XO_COST").is_some_and(|how| how == "short") { all / 5 } else { all }
}

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
fn xdp() {
    // Each start of such a test run is dear.
    const ROUNDS: usize = 40;
    // A segment's time to live goes down with each run.
    const HOPS: u32 = 250;
    let mut bench = Bench::new();
    let time = |bench: &mut Bench, what: &str, port: u16, repeat: u32| {
        let sent = packet(64, port);
        let runs = (0..ROUNDS).map(|_| {
            let mut options = TestRunOptions::new();
            options.data_in = Some(&sent);
            options.repeat = repeat;
            let result = bench.xdp().test_run(options).unwrap_or_else(|e| panic!("{}", chain(&e)));
            result.duration.as_nanos() as f64
        });
        let runs = runs.collect();
        row(&format!("XDP program, {what}"), "ns", median(runs));
    };
    time(&mut bench, "unknown flow", 40001, REPEAT / 20);
    let same: SocketAddr = "10.2.0.2:80".parse().expect("an address");
    redirect_unordered(&mut bench.steer, &key(), FLOW, same);
    time(&mut bench, "known flow: left to the ingress program", 40000, REPEAT / 20);
    bench.way(same.ip(), INGRESS, 1500, u64::MAX);
    time(&mut bench, "known flow: counted, rewritten and sent on", 40000, HOPS);
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
            for _ in 0..turns(ROUNDS) {
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

/// The same through XDP, in both places that it can run in, and beside them at tc; and what that does to packets that are none of
/// its business. In turns, each in a network of its own.
#[test]
#[ignore = "a measurement: bench/wrk/run --steering"]
fn packets_by_xdp() {
    const MODES: [&str; 3] = ["tcx", "xdp-generic", "xdp-native"];
    let turn = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for (number, mode) in MODES.into_iter().enumerate() {
            let turn = &turn;
            scope.spawn(move || {
                let wait = || {
                    let begun = Instant::now();
                    while turn.load(Ordering::Acquire) % MODES.len() != number {
                        assert!(begun.elapsed() < Duration::from_secs(60), "another one has failed");
                        std::thread::sleep(Duration::from_micros(100));
                    }
                };
                let done = || {
                    turn.fetch_add(1, Ordering::Release);
                };
                alone(|| by_turns(mode, &wait, &done));
            });
        }
    });
}

/// How many packets have got where they should.
type Count<'c> = &'c dyn Fn(&Steer) -> u64;

/// `wait` until it is our turn; `done`: it is the next one's.
fn by_turns(mode: &str, wait: &dyn Fn(), done: &dyn Fn()) {
    const ROUNDS: usize = 60;
    const PACKETS: usize = 6400;
    wait();
    let mut veth = Veth::up();
    receive_offload("va", mode == "xdp-native");
    if mode != "tcx" {
        veth.steer.attach_xdp(&["vb".into()]);
    }
    assert_eq!(veth.steer.mode(), mode);
    redirect_unordered(&mut veth.steer, &key(), FLOW, target());
    done();
    let path = if mode == "tcx" { Path::Redirected } else { Path::XdpRedirected };
    for length in [64, 1500] {
        // The stack drops what is for a port that nobody listens on.
        let data = length - 42;
        let foreign = frame(&format!("eth | v4 192.0.2.7 > 10.2.0.2 | udp 40000 > 80 | fill {data}"));
        let kinds: [(_, _, Count<'_>); 2] = [
            ("redirected", packet(length, 40000), &|steer| steer.counters()[path as usize]),
            ("UDP for nobody", foreign, &|_| without_port()),
        ];
        let mut rates: [Vec<f64>; 2] = Default::default();
        for _ in 0..turns(ROUNDS) {
            wait();
            veth.steer.refresh_ways();
            for ((_, frame, count), rates) in kinds.iter().zip(&mut rates) {
                let before = count(&veth.steer);
                let spent = Sender::new(frame).send(PACKETS);
                rates.push((count(&veth.steer) - before) as f64 / spent.as_secs_f64());
            }
            done();
        }
        for ((what, ..), rates) in kinds.iter().zip(rates) {
            row(&format!("{mode}: sent, and {what}, {length} B"), "packets/s", median(rates));
        }
    }
}

/// Datagrams that came for a port that nobody listens on, in this thread's network.
fn without_port() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").expect("counters");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let at = names.split(' ').position(|name| name == "NoPorts").expect("a counter");
    values.split(' ').nth(at).and_then(|n| n.parse().ok()).expect("a number")
}
