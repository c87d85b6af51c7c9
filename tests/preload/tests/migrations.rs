//! Connections that go from the one target to the other with every request, `XO_MIGRATIONS` times in all, while others make
//! the targets work: every byte is right, no reset is on the wire, and nothing of it all is left.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use xo_tests::counters::Counters;
use xo_tests::gauge::{self, Gauge};
use xo_tests::program::{Program, wait_for};
use xo_tests::random::setting;
use xo_tests::servers::address;
use xo_tests::{Bed, Connection, client, content};

const NODES: [&str; 3] = ["host", "t1", "t2"];
const TARGETS: [&str; 2] = ["t1", "t2"];
/// Connections that move with every request.
const MOVERS: u64 = 12;
/// Connections that stay where they are, with larger objects.
const STAYERS: u64 = 2;
/// Migrations after which the channels are up and each process knows its daemon.
const WARM_UP: u64 = 200;
/// A request in so many is an upload.
const UPLOADS: u64 = 8;
const UPLOAD_BYTES: usize = 10 << 10;

/// Clients' common ground.
struct Course {
    /// Document roots of the targets.
    roots: [PathBuf; 2],
    /// Migrations still to be made.
    left: AtomicU64,
    compared: AtomicU64,
}

impl Course {
    /// So many migrations.
    fn run(self: &Arc<Course>, bed: &Bed, migrations: u64) {
        self.left.store(migrations, Ordering::Relaxed);
        let movers = (0..MOVERS).map(|n| {
            let course = Arc::clone(self);
            bed.spawn("client", move || {
                course.wander(n).inspect_err(|_| course.left.store(0, Ordering::Relaxed))
            })
        });
        let mut clients: Vec<_> = movers.collect();
        clients.extend((0..STAYERS).map(|n| {
            let course = Arc::clone(self);
            bed.spawn("client", move || course.stay(n))
        }));
        let ended: Vec<_> = clients.into_iter().map(|c| c.join().expect("no panic")).collect();
        let errors: Vec<_> = ended.into_iter().filter_map(Result::err).collect();
        assert!(errors.is_empty(), "{} connections failed: {errors:#?}", errors.len());
    }

    /// Is one more to be made?
    fn take_one(&self) -> bool {
        self.left.try_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
    }

    fn wander(&self, number: u64) -> io::Result<()> {
        let mut c = Connection::to(&address("host"), 80)?;
        // To its first place: no migration yet.
        self.fetch(&mut c, number, number * UPLOADS)?;
        for i in number * UPLOADS + 1.. {
            if !self.take_one() {
                break;
            }
            self.fetch(&mut c, number, i).map_err(|e| io::Error::other(format!("{number}, {i}: {e}")))?;
        }
        Ok(())
    }

    /// Request `i`, for the target whose turn it is.
    fn fetch(&self, c: &mut Connection, number: u64, i: u64) -> io::Result<()> {
        let target = TARGETS[(i % 2) as usize];
        let (node, bytes) = if i % UPLOADS == UPLOADS - 1 {
            let path = format!("/up/{target}/{number}");
            let body = content::of(&format!("{path}-{i}"), UPLOAD_BYTES);
            let node = c.put(&path, &body)?.node().to_owned();
            client::same(&path, &fs::read(self.roots[(i % 2) as usize].join(&path[1..]))?, &body)?;
            (node, body.len())
        } else {
            let response = c.get(&format!("/img/{target}/{}", if i % 50 == 3 { "64k" } else { "1k" }))?;
            (response.node().to_owned(), response.body.len())
        };
        self.compared.fetch_add(bytes as u64, Ordering::Relaxed);
        if node == target { Ok(()) } else { Err(io::Error::other(format!("{node} instead of {target}"))) }
    }

    fn stay(&self, number: u64) -> io::Result<()> {
        let target = TARGETS[(number % 2) as usize];
        let mut c = Connection::to(&address("host"), 80)?;
        while self.left.load(Ordering::Relaxed) > 0 {
            let response = c.get(&format!("/img/{target}/{}", if number == 0 { "64k" } else { "1m" }))?;
            self.compared.fetch_add(response.body.len() as u64, Ordering::Relaxed);
            if response.node() != target {
                return Err(io::Error::other(format!("{} instead of {target}", response.node())));
            }
        }
        Ok(())
    }
}

fn onward(bed: &Bed) -> u64 {
    NODES.iter().map(|n| bed.status(n, "/onward_total")).sum()
}

/// Processes, descriptors and used slots of each.
fn inventory(programs: &BTreeMap<String, Program>) -> BTreeMap<String, (Vec<u32>, usize, usize)> {
    let of = |p: &Program| {
        let all = p.processes();
        let slots = all.iter().filter_map(|pid| gauge::slots_in_use(*pid)).sum();
        (all, p.descriptors(), slots)
    };
    programs.iter().map(|(name, p)| (name.clone(), of(p))).collect()
}

#[test]
fn nothing_is_left_of_many_migrations() {
    let migrations = setting("XO_MIGRATIONS", 3000);
    let bed = Bed::up(2, 1);
    let options = bed.sharded_options("");
    let daemons = NODES.map(|n| (format!("xo-peerd on {n}"), bed.peerd(n, &options)));
    // What is tested is not how an overloaded machine copes.
    daemons.iter().for_each(|(_, d)| d.prefer());
    let servers = NODES.map(|n| format!("nginx on {n}")).into_iter().zip(bed.sharded_servers(false));
    let mut programs: BTreeMap<_, _> = daemons.into_iter().chain(servers).collect();
    let roots = TARGETS.map(|t| bed.root(t));
    let course = Arc::new(Course { roots, left: AtomicU64::new(0), compared: AtomicU64::new(0) });
    course.run(&bed, WARM_UP);
    bed.wait_idle(&NODES);
    let (before, already) = (inventory(&programs), onward(&bed));

    let processes = programs.iter().map(|(name, p)| (name.clone(), p.processes())).collect();
    let gauge = Gauge::start(processes, Duration::from_millis(if migrations > 10_000 { 500 } else { 50 }));
    let counted = Counters::of(&bed);
    let begun = Instant::now();
    course.run(&bed, migrations);
    let took = begun.elapsed();
    let samples = gauge.stop();
    let counted = Counters::of(&bed).since(&counted);
    let muted: u64 = NODES.iter().map(|n| bed.status(n, "/steering/packets/muted")).sum();
    println!(
        "{migrations} migrations of {MOVERS} connections in {:.1} s, {:.0} a second; {} MiB compared",
        took.as_secs_f64(),
        migrations as f64 / took.as_secs_f64(),
        course.compared.load(Ordering::Relaxed) >> 20
    );
    println!("resets: {} counted by stacks, {muted} of them muted; {}", counted.resets(), counted.troubles());
    println!("segments sent again: {}, of them losses: {}", counted.retransmissions(), counted.losses());
    for node in NODES {
        let status = bed.try_status(node).expect("a status");
        println!("{node}: onward {} {}", status["onward_total"], status["onward_us"]);
        assert_eq!(status["failed_total"], 0, "{node}: {}", status["failed_by_reason"]);
        assert_eq!(status["refused_total"], 0, "{node}: {}", status["refused_by_reason"]);
    }
    print!("{}", gauge::summary(&samples));
    assert_eq!(onward(&bed) - already, migrations, "each request moved its connection once");
    // A stack that answers a packet to a connection that has just left counts it; it does not reach the wire.
    assert_eq!(counted.get_on("client", "EstabResets"), 0, "{}", counted.troubles());
    assert!(counted.resets() <= muted as i64, "{muted} muted: {}", counted.troubles());

    // Also the rules that keep detours for a while.
    bed.wait_idle_for(Duration::from_secs(60), &NODES);
    let mut after = BTreeMap::new();
    let as_before = wait_for(Duration::from_secs(20), || {
        after = inventory(&programs);
        after == before
    });
    assert!(as_before, "processes, descriptors, slots: {before:#?} before, {after:#?} after");
    gauge::grows_not(&samples, MOVERS + STAYERS);
    for (name, program) in &mut programs {
        assert_eq!(program.stop(), Some(0), "{name}: {}", program.output());
    }
    NODES.iter().for_each(|n| bed.nothing_left(n));
}
