//! Many connections at once, with requests of mixed sizes.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use crate::servers::{address, address6};
use crate::{Bed, Connection, content};

/// A load.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Connections, all open at the same time.
    pub connections: u32,
    /// Requests on each.
    pub requests: u32,
    /// Whether the policy moves them: asks for `/img/` and `/up/`, else only for `/loc/` and `/put/`.
    pub moving: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Requests by node that answered.
    pub by_node: BTreeMap<String, u32>,
    /// What went wrong.
    pub errors: Vec<String>,
    /// Uploads: node, path and size.
    pub uploads: Vec<(String, String, usize)>,
}

/// Name and size of a request's object, weighted so that a thousand requests move some 100 MB.
fn pick(n: u32, largest: usize) -> (&'static str, usize) {
    let index = match n % 200 {
        0 => 5,
        i if i % 20 == 1 => 4,
        i => (i % 4) as usize,
    };
    let fitting = |i: &usize| content::SIZES[*i].1 <= largest;
    content::SIZES[(0..=index).rev().find(fitting).unwrap_or_default()]
}

/// Carries the load from the client to the host; half the connections over IPv6.
#[must_use]
pub fn run(bed: &Bed, load: Load) -> Outcome {
    run_sizes(bed, load, usize::MAX)
}

/// As [`run`], with the sizes cut off at `largest`.
#[must_use]
pub fn run_sizes(bed: &Bed, load: Load, largest: usize) -> Outcome {
    let threads: Vec<_> =
        (0..load.connections).map(|i| bed.spawn("client", move || one(i, load, largest))).collect();
    let mut all = Outcome::default();
    for thread in threads {
        let one =
            thread.join().unwrap_or_else(|_| Outcome { errors: vec!["panic".into()], ..Outcome::default() });
        for (node, n) in one.by_node {
            *all.by_node.entry(node).or_default() += n;
        }
        all.errors.extend(one.errors);
        all.uploads.extend(one.uploads);
    }
    for (node, path, size) in &all.uploads {
        let stored = fs::read(bed.root(node).join(&path[1..])).unwrap_or_default();
        if let Err(e) = crate::client::same(path, &stored, &content::of(path, *size)) {
            all.errors.push(format!("stored at {node}: {e}"));
        }
    }
    all
}

fn one(number: u32, load: Load, largest: usize) -> Outcome {
    let mut outcome = Outcome::default();
    if let Err(e) = talk(number, load, largest, &mut outcome) {
        outcome.errors.push(format!("connection {number}: {e}"));
    }
    outcome
}

fn talk(number: u32, load: Load, largest: usize, outcome: &mut Outcome) -> io::Result<()> {
    let host = if number.is_multiple_of(2) { address("host") } else { address6("host") };
    let mut connection = Connection::to(&host, 80)?;
    // The first few are served where the connection arrived.
    let first_moving = number % 5;
    for i in 0..load.requests {
        let (name, size) = pick(number * 7 + i, largest);
        let moving = load.moving && i >= first_moving;
        let response = if (number + i) % 4 == 3 {
            let directory = if moving { "up" } else { "put" };
            let path = format!("/{directory}/{number}-{i}-{name}");
            let response = connection.put(&path, &content::of(&path, size))?;
            outcome.uploads.push((response.node().into(), path, size));
            response
        } else {
            connection.get(&format!("/{}/{name}", if moving { "img" } else { "loc" }))?
        };
        *outcome.by_node.entry(response.node().into()).or_default() += 1;
    }
    Ok(())
}
