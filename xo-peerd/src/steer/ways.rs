//! The ways to the machines that connections are redirected to, for the ingress program: a route looked up once, not for
//! each packet. Neighbours stay the kernel's business, which knows when one has moved.
//!
//! What the program finds is good for a few seconds only and renewed meanwhile, so that a machine whose daemon has died
//! follows its routes again.
//!
//! The XDP program sends frames itself, so it is told Ethernet addresses too, where it can (`xdp.rs`).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use aya::maps::{HashMap, MapData};
use xo_bpf_abi::{MAX_HOPS, NextHop};
use xo_sys::route::{RouteLookup, RouteWatch, Way};

use super::mapped;
use super::xdp::Fast;
use crate::clock::now_ns;

/// How long an entry is good. Renewed every second.
const LIFE: Duration = Duration::from_secs(3);

/// The map and what is in it.
pub(super) struct Ways {
    map: HashMap<MapData, [u32; 4], NextHop>,
    lookup: RouteLookup,
    watch: RouteWatch,
    known: BTreeSet<IpAddr>,
    fast: Option<Fast>,
}

impl Ways {
    /// # Errors
    /// Of socket(2) and bind(2).
    pub(super) fn new(map: HashMap<MapData, [u32; 4], NextHop>) -> std::io::Result<Ways> {
        Ok(Ways {
            map,
            lookup: RouteLookup::new()?,
            watch: RouteWatch::new()?,
            known: BTreeSet::new(),
            fast: None,
        })
    }

    /// From now on the XDP program is told, too, what it needs.
    pub(super) fn tell_xdp(&mut self, fast: Fast) {
        self.fast = Some(fast);
        self.refresh();
    }

    /// Packets are going to be sent there. Beyond the map's size they go as the kernel finds.
    pub(super) fn learn(&mut self, to: IpAddr) {
        if self.known.len() < MAX_HOPS as usize && self.known.insert(to) {
            self.renew(to);
        }
    }

    /// Readable when routes have changed: see [`Ways::changed`].
    pub(super) fn fd(&self) -> RawFd {
        self.watch.as_raw_fd()
    }

    /// Looks all ways up again if routes have changed.
    pub(super) fn changed(&mut self) {
        if self.watch.changed() {
            self.refresh();
        }
    }

    /// Looks all ways up again.
    pub(super) fn refresh(&mut self) {
        for to in std::mem::take(&mut self.known) {
            self.renew(to);
            self.known.insert(to);
        }
    }

    /// Has the programs believe in a way.
    #[cfg(test)]
    pub(super) fn pretend(&mut self, to: IpAddr, hop: NextHop) {
        self.map.insert(mapped(to), hop, 0).expect("the map");
    }

    /// Takes that back.
    #[cfg(test)]
    pub(super) fn withdraw(&mut self, to: IpAddr) {
        self.map.remove(&mapped(to)).expect("the map");
    }

    /// Empties the map, as time does.
    #[cfg(test)]
    pub(super) fn forget(&mut self) {
        for to in &self.known {
            let _ = self.map.remove(&mapped(*to));
        }
    }

    fn renew(&mut self, to: IpAddr) {
        let way = self.lookup.way(to).unwrap_or_else(|e| {
            log::warn!("the way to {to}: {e}");
            None
        });
        let key = mapped(to);
        let result = match way {
            Some(way) => {
                let mut hop = next_hop(way);
                if let Some(fast) = &mut self.fast {
                    fast.complete(&mut hop, way);
                }
                self.map.insert(key, hop, 0)
            }
            // The kernel may know one when a packet comes.
            None => self.map.remove(&key),
        };
        if let (Err(e), Some(_)) = (result, way) {
            log::warn!("the way to {to}: {e}");
        }
    }
}

fn next_hop(way: Way) -> NextHop {
    let (family, address) = match way.neighbour {
        IpAddr::V4(_) => (libc::AF_INET, [mapped(way.neighbour)[3], 0, 0, 0]),
        IpAddr::V6(_) => (libc::AF_INET6, mapped(way.neighbour)),
    };
    let until_ns = now_ns() + LIFE.as_nanos() as u64;
    let (interface, family) = (way.interface, family as u32);
    NextHop { until_ns, interface, family, address, xdp_longest: 0, xdp_back: 0, ethernet: [0; 6] }
}
