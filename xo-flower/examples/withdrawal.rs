//! How long a rule's withdrawal takes while short-lived flows come and go (Figure 4 of the paper), at a NIC that is not there:
//!
//! `withdrawal NIC queue|backlog FLOWS_PER_SECOND LIFETIME_US SECONDS LENGTH`
//!
//! `queue`: XO's, where a removal cancels an insertion that waits. `backlog`: as in the kernel, where each command waits for all before it.
//! Flows come at exponential intervals and live for exponential times, the same ones in both cases. Prints one line of JSON.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::env;
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use xo_flower::nic::SPEEDS;
use xo_flower::{Nic, Removal, Report, Simulated, Speed, queue};

/// Exact sleeping: the rest is spent in a loop.
const SLEEP_ERROR: Duration = Duration::from_micros(100);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Comes(u32),
    Goes(u32),
}

/// What the run comes to.
#[derive(Default)]
struct Outcome {
    /// Nanoseconds from asking to being sure, each.
    latencies: Vec<u64>,
    flows: u32,
    inserted: u64,
    cancelled: u64,
    full: u64,
}

/// xorshift64*: the same flows in each run.
struct Random(u64);

impl Random {
    /// Exponential.
    fn time(&mut self, mean: Duration) -> Duration {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let unit = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1_u64 << 53) as f64;
        mean.mul_f64(-(1.0 - unit).ln())
    }
}

/// All that happens, in order of time.
fn schedule(rate: f64, lifetime: Duration, length: Duration) -> Vec<(Duration, Event)> {
    let (mut random, mut now, mut heap) = (Random(1), Duration::ZERO, BinaryHeap::new());
    for flow in 0.. {
        now += random.time(Duration::from_secs_f64(1.0 / rate));
        if now > length {
            break;
        }
        heap.push(Reverse((now, Event::Comes(flow))));
        heap.push(Reverse((now + random.time(lifetime), Event::Goes(flow))));
    }
    std::iter::from_fn(|| heap.pop().map(|Reverse(event)| event)).collect()
}

fn wait_until(when: Instant) {
    if let Some(most) = when.saturating_duration_since(Instant::now()).checked_sub(SLEEP_ERROR) {
        thread::sleep(most);
    }
    while Instant::now() < when {
        thread::yield_now();
    }
}

fn with_queue(events: &[(Duration, Event)], speed: Speed, length: usize) -> Outcome {
    let (queue, worker) = queue(length);
    let (report, reports) = channel();
    let working = thread::spawn(move || {
        worker.run(&mut Simulated::new(speed), |flow: &u32, what| {
            let _ = report.send((*flow, what, Instant::now()));
        });
    });
    let (mut outcome, mut tickets, mut asked) = (Outcome::default(), HashMap::new(), HashMap::new());
    let begun = Instant::now();
    for (when, event) in events {
        wait_until(begun + *when);
        match *event {
            Event::Comes(flow) => {
                outcome.flows += 1;
                if let Ok(ticket) = queue.insert(flow) {
                    tickets.insert(flow, ticket);
                }
            }
            Event::Goes(flow) => {
                let Some(ticket) = tickets.remove(&flow) else { continue };
                let now = Instant::now();
                match queue.remove(&ticket) {
                    Removal::Done => outcome.latencies.push(now.elapsed().as_nanos() as u64),
                    Removal::Waits => drop(asked.insert(flow, now)),
                }
            }
        }
    }
    queue.close();
    let _ = working.join();
    for (flow, what, when) in reports {
        match what {
            Report::Inserted => {}
            Report::Removed => {
                let since = asked.get(&flow).map_or(Duration::ZERO, |asked| when - *asked);
                outcome.latencies.push(since.as_nanos() as u64);
            }
            Report::Refused(e) | Report::Stuck(e) => match e {},
        }
    }
    (outcome.cancelled, outcome.full) = (queue.counts().cancelled, queue.counts().full);
    outcome.inserted = u64::from(outcome.flows) - outcome.cancelled - outcome.full;
    outcome
}

/// A thread that does as the kernel: one command after the other.
fn backlog(
    speed: Speed,
    done: Sender<(Instant, Instant)>,
) -> (Sender<(Event, Instant)>, thread::JoinHandle<()>) {
    let (send, commands) = channel::<(Event, Instant)>();
    let kernel = thread::spawn(move || {
        let mut nic = Simulated::new(speed);
        for (command, asked) in commands {
            match command {
                Event::Comes(flow) => nic.insert(&flow).unwrap_or_else(|e| match e {}),
                Event::Goes(flow) => {
                    nic.remove(&flow).unwrap_or_else(|e| match e {});
                    let _ = done.send((asked, Instant::now()));
                }
            }
        }
    });
    (send, kernel)
}

fn with_backlog(events: &[(Duration, Event)], speed: Speed) -> Outcome {
    let (done, removed) = channel();
    let (send, kernel) = backlog(speed, done);
    let mut outcome = Outcome::default();
    let begun = Instant::now();
    for (when, event) in events {
        wait_until(begun + *when);
        outcome.flows += u32::from(matches!(event, Event::Comes(_)));
        let _ = send.send((*event, Instant::now()));
    }
    drop(send);
    let _ = kernel.join();
    outcome.inserted = outcome.flows.into();
    outcome.latencies.extend(removed.into_iter().map(|(asked, at)| (at - asked).as_nanos() as u64));
    outcome
}

fn main() {
    let words: Vec<_> = env::args().skip(1).collect();
    let usage = "usage: withdrawal NIC queue|backlog FLOWS_PER_SECOND LIFETIME_US SECONDS LENGTH";
    let [nic, mode, rate, lifetime, seconds, length] = words.as_slice() else { panic!("{usage}") };
    let speed =
        SPEEDS.iter().find(|(name, _)| name == nic).unwrap_or_else(|| panic!("{nic}: of {SPEEDS:?}")).1;
    let number = |text: &String| text.parse::<f64>().unwrap_or_else(|e| panic!("{text}: {e}"));
    let lifetime_us = number(lifetime);
    let events = schedule(
        number(rate),
        Duration::from_secs_f64(lifetime_us / 1e6),
        Duration::from_secs_f64(number(seconds)),
    );
    let mut outcome = match mode.as_str() {
        "queue" => with_queue(&events, speed, number(length) as usize),
        "backlog" => with_backlog(&events, speed),
        _ => panic!("{usage}"),
    };
    outcome.latencies.sort_unstable();
    let all = &outcome.latencies;
    let at = |share: f64| {
        let last = all.len().saturating_sub(1);
        all.get((last as f64 * share) as usize).map_or(0.0, |ns| *ns as f64 / 1000.0)
    };
    println!(
        "{{\"nic\": \"{nic}\", \"mode\": \"{mode}\", \"flows_per_s\": {rate}, \"lifetime_us\": {lifetime_us}, \"flows\": {}, \
         \"withdrawals\": {}, \"inserted\": {}, \"cancelled\": {}, \"full\": {}, \"p50_us\": {:.1}, \"p99_us\": {:.1}, \
         \"max_us\": {:.1}}}",
        outcome.flows,
        all.len(),
        outcome.inserted,
        outcome.cancelled,
        outcome.full,
        at(0.5),
        at(0.99),
        at(1.0),
    );
}
