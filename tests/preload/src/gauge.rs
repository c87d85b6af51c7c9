//! Memory and descriptors of processes over a long time.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use xo_proto::slot::{COUNTERS, DELIVERIES, SLOTS, WAKE_PORTS};

const PAGE_KIB: u64 = 4;
/// Share of the samples that belong to the warming up: tables and buffers grow to their size.
const WARM_UP: usize = 5;
/// Growth of the median from the first to the last third that is no leak, KiB and per cent.
const MEMORY_SLACK: u64 = 4 << 10;
const MEMORY_PERCENT: u64 = 10;

/// Resident memory, KiB, and open descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Resident memory, KiB.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: u64,
}

/// Samples by what they are of, in order of time.
pub type Samples = BTreeMap<String, Vec<Sample>>;

/// A thread that takes samples.
#[derive(Debug)]
pub struct Gauge {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Samples>,
}

impl Gauge {
    /// Samples these processes, those with the same name together, every so often.
    #[must_use]
    pub fn start(processes: BTreeMap<String, Vec<u32>>, every: Duration) -> Gauge {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut samples = Samples::new();
            while !stopped.load(Ordering::Relaxed) {
                for (name, pids) in &processes {
                    samples.entry(name.clone()).or_default().push(sample(pids));
                }
                sleep(every);
            }
            samples
        });
        Gauge { stop, thread }
    }

    /// Ends it.
    ///
    /// # Panics
    /// When its thread has.
    #[must_use]
    pub fn stop(self) -> Samples {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("samples")
    }
}

fn sample(pids: &[u32]) -> Sample {
    let memory = |pid: &u32| {
        let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
        pages.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or_default() * PAGE_KIB
    };
    let descriptors = |pid: &u32| fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count) as u64;
    Sample { memory: pids.iter().map(memory).sum(), descriptors: pids.iter().map(descriptors).sum() }
}

/// Medians of the first and of the last third of the samples.
fn thirds(samples: &[Sample]) -> [Sample; 2] {
    let third = samples.len().div_ceil(3);
    let median = |of: &[Sample]| {
        let middle = |get: fn(&Sample) -> u64| {
            let mut all: Vec<_> = of.iter().map(get).collect();
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or_default()
        };
        Sample { memory: middle(|s| s.memory), descriptors: middle(|s| s.descriptors) }
    };
    [median(&samples[..third]), median(&samples[samples.len() - third..])]
}

/// Without those of the warming up.
fn settled(samples: &[Sample]) -> &[Sample] {
    &samples[samples.len() / WARM_UP..]
}

/// A line for each: medians of the first and the last third after the warming up.
#[must_use]
pub fn summary(samples: &Samples) -> String {
    let line = |(name, all): (&String, &Vec<Sample>)| {
        let [first, last] = thirds(settled(all));
        format!(
            "{name}: {} to {} KiB, {} to {} descriptors\n",
            first.memory, last.memory, first.descriptors, last.descriptors
        )
    };
    samples.iter().map(line).collect()
}

/// Neither memory has grown nor, by more than `descriptors`, the number of open descriptors.
///
/// # Panics
/// When one has.
pub fn grows_not(samples: &Samples, descriptors: u64) {
    for (name, all) in samples {
        let [first, last] = thirds(settled(all));
        let most = first.memory + first.memory * MEMORY_PERCENT / 100 + MEMORY_SLACK;
        assert!(last.memory <= most, "{name}: {} KiB, then {}", first.memory, last.memory);
        let most = first.descriptors + descriptors;
        assert!(
            last.descriptors <= most,
            "{name}: {} descriptors, then {}",
            first.descriptors,
            last.descriptors
        );
    }
}

/// Slots and deliveries in use in a process under the library: what its slot table says, which it shares with its daemon.
/// `None` when it has no table.
#[must_use]
pub fn slots_in_use(pid: u32) -> Option<usize> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let range = maps.lines().find(|l| l.contains("memfd:xo-slots"))?.split(' ').next()?;
    let start = u64::from_str_radix(range.split('-').next()?, 16).ok()?;
    // Behind magic, size, wake-up ports and counters (`xo_sys::slots`).
    let offset = (2 + WAKE_PORTS) * 4 + COUNTERS * 8;
    let mut words = vec![0; (SLOTS + DELIVERIES) * 4];
    fs::File::open(format!("/proc/{pid}/mem")).ok()?.read_exact_at(&mut words, start + offset as u64).ok()?;
    // The state is in the lower half.
    Some(words.chunks(4).filter(|word| word[..2] != [0, 0]).count())
}
