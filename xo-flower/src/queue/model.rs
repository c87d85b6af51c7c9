//! All interleavings of those who ask and the one who works, by loom: `RUSTFLAGS="--cfg loom" cargo test --release -p xo-flower --lib model`.

use std::collections::HashSet;

use loom::sync::{Arc, Mutex};
use loom::thread;

use super::*;

/// What the other threads may see of the NIC, and what has been reported.
#[derive(Default)]
struct Seen {
    inside: HashSet<u8>,
    ever: HashSet<u8>,
    removed: Vec<u8>,
    refused: Vec<u8>,
}

struct Modelled {
    seen: Arc<Mutex<Seen>>,
    takes: bool,
}

impl Nic for Modelled {
    type Rule = u8;
    type Error = ();

    fn insert(&mut self, rule: &u8) -> Result<(), ()> {
        if !self.takes {
            return Err(());
        }
        let mut seen = self.seen.lock().unwrap();
        assert!(seen.inside.insert(*rule) && seen.ever.insert(*rule), "put in twice");
        Ok(())
    }

    fn remove(&mut self, rule: &u8) -> Result<(), ()> {
        assert!(self.seen.lock().unwrap().inside.remove(rule), "taken out, but not in");
        Ok(())
    }
}

fn work(worker: Worker<u8>, takes: bool, seen: &Arc<Mutex<Seen>>) -> thread::JoinHandle<()> {
    let seen = seen.clone();
    thread::spawn(move || {
        let mut nic = Modelled { seen: seen.clone(), takes };
        worker.run(&mut nic, |rule, what| {
            let mut seen = seen.lock().unwrap();
            match what {
                Report::Inserted => assert!(!seen.removed.contains(rule), "told in the wrong order"),
                Report::Removed => {
                    assert!(!seen.inside.contains(rule), "said to be out, but in");
                    seen.removed.push(*rule);
                }
                Report::Refused(()) => seen.refused.push(*rule),
                Report::Stuck(()) => unreachable!(),
            }
        });
    })
}

/// What must hold whatever happened, when all is over.
fn settled(seen: &Seen, rule: u8, removal: Removal) {
    assert!(!seen.inside.contains(&rule), "withdrawn, but in");
    match removal {
        Removal::Waits => assert_eq!(seen.removed, [rule], "told once"),
        Removal::Done => assert!(seen.removed.is_empty() && !seen.ever.contains(&rule), "it was never in"),
    }
}

#[test]
fn model_withdrawal_is_complete() {
    for takes in [true, false] {
        loom::model(move || {
            let (queue, worker) = queue(1);
            let seen = Arc::new(Mutex::new(Seen::default()));
            let working = work(worker, takes, &seen);
            let ticket = queue.insert(1).unwrap();
            let removal = queue.remove(&ticket);
            if removal == Removal::Done {
                assert!(!seen.lock().unwrap().inside.contains(&1), "said to be out, but in");
            }
            queue.close();
            working.join().unwrap();
            let seen = seen.lock().unwrap();
            settled(&seen, 1, removal);
            assert!(takes || seen.ever.is_empty());
        });
    }
}

#[test]
fn model_two_ask_for_the_same_removal() {
    loom::model(|| {
        let (queue, worker) = queue(1);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let working = work(worker, true, &seen);
        let ticket = Arc::new(queue.insert(1).unwrap());
        let other = {
            let (queue, ticket) = (queue.clone(), ticket.clone());
            thread::spawn(move || queue.remove(&ticket))
        };
        let answers = [queue.remove(&ticket), other.join().unwrap()];
        queue.close();
        working.join().unwrap();
        let seen = seen.lock().unwrap();
        // Who asks late may find it out already.
        let removal = if answers.contains(&Removal::Waits) { Removal::Waits } else { Removal::Done };
        settled(&seen, 1, removal);
    });
}

#[test]
fn model_two_producers_share_a_short_queue() {
    loom::model(|| {
        let (queue, worker) = queue(1);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let working = work(worker, true, &seen);
        let other = {
            let queue = queue.clone();
            thread::spawn(move || queue.insert(2).is_ok())
        };
        let removal = queue.insert(1).ok().map(|ticket| queue.remove(&ticket));
        let second = other.join().unwrap();
        assert!(removal.is_some() || second, "one of them found room");
        queue.close();
        working.join().unwrap();
        let seen = seen.lock().unwrap();
        match removal {
            Some(removal) => settled(&seen, 1, removal),
            None => assert!(!seen.ever.contains(&1), "there was no room"),
        }
        assert!(second || !seen.ever.contains(&2));
    });
}

#[test]
fn model_no_command_is_slept_through() {
    loom::model(|| {
        let (queue, worker) = queue(1);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let told = Arc::new((Mutex::new(Vec::new()), loom::sync::Condvar::new()));
        let working = {
            let told = told.clone();
            thread::spawn(move || {
                let mut nic = Modelled { seen, takes: true };
                worker.run(&mut nic, |_, what| {
                    told.0.lock().unwrap().push(what);
                    told.1.notify_one();
                });
            })
        };
        // Nobody rings again: loom finds the deadlock if the worker sleeps.
        let wait_for = |what: Report<()>| {
            let mut all = told.0.lock().unwrap();
            while all.last() != Some(&what) {
                all = told.1.wait(all).unwrap();
            }
        };
        let ticket = queue.insert(1).unwrap();
        wait_for(Report::Inserted);
        assert_eq!(queue.remove(&ticket), Removal::Waits);
        wait_for(Report::Removed);
        queue.close();
        working.join().unwrap();
    });
}
