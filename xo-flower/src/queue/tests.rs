use std::collections::HashSet;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::nic::{Simulated, Speed};

/// Does each command when told to, and says when it begins one.
struct Slow {
    begun: Sender<(&'static str, u32)>,
    go: Receiver<bool>,
    rules: HashSet<u32>,
}

impl Nic for Slow {
    type Rule = u32;
    type Error = &'static str;

    fn insert(&mut self, rule: &u32) -> Result<(), &'static str> {
        self.begun.send(("insert", *rule)).expect("the test listens");
        if !self.go.recv().expect("the test answers") {
            return Err("no");
        }
        assert!(self.rules.insert(*rule), "{rule} is in");
        Ok(())
    }

    fn remove(&mut self, rule: &u32) -> Result<(), &'static str> {
        self.begun.send(("remove", *rule)).expect("the test listens");
        if !self.go.recv().expect("the test answers") {
            return Err("no");
        }
        assert!(self.rules.remove(rule), "{rule} is not in");
        Ok(())
    }
}

struct Bench {
    queue: Queue<u32>,
    begun: Receiver<(&'static str, u32)>,
    go: Sender<bool>,
    reports: Receiver<(u32, Report<&'static str>)>,
    worker: JoinHandle<HashSet<u32>>,
}

impl Bench {
    fn new(length: usize) -> Bench {
        let (queue, worker) = queue(length);
        let ((tell, begun), (go, gone), (report, reports)) = (channel(), channel(), channel());
        let worker = thread::spawn(move || {
            let mut nic = Slow { begun: tell, go: gone, rules: HashSet::new() };
            worker.run(&mut nic, |rule, what| report.send((*rule, what)).expect("the test listens"));
            nic.rules
        });
        Bench { queue, begun, go, reports, worker }
    }

    /// The next command begins, and is this one.
    fn begins(&self, what: &'static str, rule: u32) {
        assert_eq!(self.begun.recv_timeout(Duration::from_secs(20)), Ok((what, rule)));
    }

    fn ends(&self, ok: bool) {
        self.go.send(ok).expect("the worker waits");
    }

    fn reports(&self, rule: u32, what: Report<&'static str>) {
        assert_eq!(self.reports.recv_timeout(Duration::from_secs(20)), Ok((rule, what)));
    }

    /// What is in the NIC at the end, all reports having been looked at.
    fn closed(self) -> HashSet<u32> {
        self.queue.close();
        let rules = self.worker.join().expect("no panic");
        assert!(self.reports.try_recv().is_err() && self.begun.try_recv().is_err(), "something unexpected");
        rules
    }
}

#[test]
fn a_removal_that_meets_its_insertion_in_the_queue_cancels_it() {
    let bench = Bench::new(4);
    let first = bench.queue.insert(1).expect("room");
    bench.begins("insert", 1);
    let second = bench.queue.insert(2).expect("room");
    let third = bench.queue.insert(3).expect("room");
    assert_eq!(bench.queue.remove(&second), Removal::Done);
    assert_eq!(bench.queue.remove(&second), Removal::Done, "twice");
    assert_eq!(bench.queue.counts(), Counts { depth: 2, cancelled: 1, full: 0 });
    bench.ends(true);
    bench.reports(1, Report::Inserted);
    bench.begins("insert", 3);
    bench.ends(true);
    bench.reports(3, Report::Inserted);
    drop((first, third));
    assert_eq!(bench.closed(), HashSet::from([1, 3]));
}

#[test]
fn a_removal_that_meets_its_insertion_under_way_follows_it() {
    for taken in [true, false] {
        let bench = Bench::new(4);
        let ticket = bench.queue.insert(1).expect("room");
        bench.begins("insert", 1);
        assert_eq!([bench.queue.remove(&ticket), bench.queue.remove(&ticket)], [Removal::Waits; 2]);
        bench.ends(taken);
        if taken {
            bench.begins("remove", 1);
            assert!(bench.reports.try_recv().is_err(), "it is in still");
            assert_eq!(bench.queue.remove(&ticket), Removal::Waits);
            bench.ends(true);
        }
        bench.reports(1, Report::Removed);
        assert_eq!(bench.queue.remove(&ticket), Removal::Done);
        assert_eq!(bench.closed(), HashSet::new());
    }
}

#[test]
fn removals_go_first_and_the_queue_is_bounded() {
    let bench = Bench::new(2);
    let first = bench.queue.insert(1).expect("room");
    bench.begins("insert", 1);
    bench.ends(true);
    bench.reports(1, Report::Inserted);
    let second = bench.queue.insert(2).expect("room");
    bench.begins("insert", 2);
    let waiting = [3, 4].map(|rule| bench.queue.insert(rule).expect("room"));
    assert_eq!(bench.queue.insert(5).err(), Some(5));
    assert_eq!(bench.queue.counts(), Counts { depth: 2, cancelled: 0, full: 1 });
    assert_eq!(bench.queue.remove(&first), Removal::Waits, "there is always room for removals");
    bench.ends(true);
    bench.reports(2, Report::Inserted);
    bench.begins("remove", 1);
    bench.ends(true);
    bench.reports(1, Report::Removed);
    bench.begins("insert", 3);
    bench.queue.close();
    bench.ends(false);
    bench.reports(3, Report::Refused("no"));
    drop((second, waiting));
    assert_eq!(bench.closed(), HashSet::from([2]), "what still waited is not put in");
}

#[test]
fn a_rule_that_is_stuck_can_be_asked_for_again() {
    let bench = Bench::new(1);
    let ticket = bench.queue.insert(1).expect("room");
    bench.begins("insert", 1);
    bench.ends(true);
    bench.reports(1, Report::Inserted);
    for (ends, what) in [(false, Report::Stuck("no")), (true, Report::Removed)] {
        assert_eq!(bench.queue.remove(&ticket), Removal::Waits);
        bench.begins("remove", 1);
        bench.ends(ends);
        bench.reports(1, what);
    }
    assert_eq!(bench.closed(), HashSet::new());
}

#[test]
fn what_was_withdrawn_is_not_in_the_nic_whoever_asks_and_when() {
    const THREADS: u32 = 4;
    const EACH: u32 = 2000;
    let (queue, worker) = queue(64);
    let (report, reports) = channel();
    let working = thread::spawn(move || {
        let none = Duration::ZERO;
        let mut nic = Simulated::new(Speed { insert: none, remove: none });
        worker.run(&mut nic, |rule, what| report.send((*rule, what)).expect("the test listens"));
        nic.rules().clone()
    });
    let asking: Vec<_> = (0..THREADS)
        .map(|thread| {
            let queue = queue.clone();
            thread::spawn(move || {
                let (mut keep, mut done, mut waits) = (HashSet::new(), HashSet::new(), HashSet::new());
                for rule in thread * EACH..(thread + 1) * EACH {
                    let Ok(ticket) = queue.insert(rule) else { continue };
                    if rule % 3 == 0 {
                        thread::yield_now();
                    }
                    match (rule % 7 == 0, (rule % 7 != 0).then(|| queue.remove(&ticket))) {
                        (true, _) => keep.insert(rule),
                        (_, Some(Removal::Done)) => done.insert(rule),
                        _ => waits.insert(rule),
                    };
                }
                (keep, done, waits)
            })
        })
        .collect();
    let (mut keep, mut done, mut waits) = (HashSet::new(), HashSet::new(), HashSet::new());
    for thread in asking {
        let its = thread.join().expect("no panic");
        keep.extend(its.0);
        done.extend(its.1);
        waits.extend(its.2);
    }
    let (mut inserted, mut removed) = (HashSet::new(), HashSet::new());
    while inserted.intersection(&keep).count() < keep.len() || removed.len() < waits.len() {
        match reports.recv_timeout(Duration::from_secs(20)).expect("a report") {
            (rule, Report::Inserted) => assert!(inserted.insert(rule), "{rule} twice"),
            (rule, Report::Removed) => assert!(removed.insert(rule), "{rule} twice"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(removed, waits);
    assert!(inserted.is_disjoint(&done), "cancelled, and put in all the same");
    assert_eq!(queue.counts().cancelled, done.len() as u64);
    assert_eq!(queue.counts().depth, 0);
    queue.close();
    assert_eq!(working.join().expect("no panic"), keep);
}
