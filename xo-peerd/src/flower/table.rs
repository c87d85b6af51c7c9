//! The rules themselves: which interfaces take them, how they look, the thread that puts them in.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use mio::Waker;
use xo_bpf_abi::FLAG_RULE;
use xo_flower::queue::Counts;
use xo_flower::{
    ANCHOR, Channel, Error, FlowRules, Hook, Kernel, Place, Queue, Removal, Report, Rewrite, Rule, Taken,
    Ticket, Worker, queue,
};
use xo_proto::wire::HandoffId;
use xo_sys::route::RouteLookup;

use crate::config::{FlowerMode, Steering, interface_number};
use crate::steer::Steer;

/// XO's rules are those of this preference, and of the next higher one ("XO").
const PREFERENCE: u16 = 0x584f;

/// Where a target's packets go: interface, and Ethernet addresses of neighbour and interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    interface: u32,
    ethernet: ([u8; 6], [u8; 6]),
}

/// What became of a rule: the hand-off, the rule's handle, the report.
pub(super) type News = (HandoffId, u32, Report<Error>);

/// The flow table of NIC or kernel, as the daemon sees it.
pub(super) struct Table {
    place: Place,
    /// Numbers and names of the interfaces whose packets meet rules.
    interfaces: Vec<(u32, String)>,
    lookup: RouteLookup,
    channel: Channel,
    /// By target.
    hops: HashMap<IpAddr, Option<Hop>>,
    queue: Queue<FlowRules>,
    news: Receiver<News>,
    worker: Option<JoinHandle<()>>,
    unstarted: Option<(Worker<FlowRules>, Sender<News>)>,
    next_handle: u32,
}

impl Table {
    /// Finds out which interfaces take rules. An earlier daemon's rules go, its anchors among them: its flows are in eBPF.
    ///
    /// # Errors
    /// Why there will be no rules.
    pub(super) fn open(config: &Steering, interfaces: &[String], steer: &mut Steer) -> Result<Table, String> {
        let text = |e: Error| e.to_string();
        let mut channel = Channel::open().map_err(text)?;
        let named = interfaces.iter().filter_map(|name| Some((interface_number(name)?, name.clone())));
        let interfaces: Vec<_> = named.collect();
        forget_rules(steer, &mut channel, &interfaces)?;
        let place = match config.flower {
            FlowerMode::Off => return Err("off".into()),
            FlowerMode::Hardware => Place::Hardware,
            FlowerMode::Software => Place::Software,
        };
        let mut takes = Vec::new();
        for (number, name) in &interfaces {
            match channel.probe(*number) {
                Ok(Taken { hardware: true, .. }) if place == Place::Hardware => {
                    takes.push((*number, name.clone()))
                }
                Ok(Taken { software: true, .. }) if place == Place::Software => {
                    takes.push((*number, name.clone()))
                }
                Ok(_) => {}
                Err(e) => log::debug!("{name}: {e}"),
            }
        }
        // The program passes a flow's packets to the kernel's rules wherever they come in.
        let all = takes.len() == interfaces.len();
        if takes.is_empty() || place == Place::Software && !all {
            let who = if place == Place::Hardware { "no NIC" } else { "not the kernel" };
            return Err(format!("{who} takes rules ({})", names(&interfaces)));
        }
        for (number, name) in &takes {
            // Without one rules come and go at a higher price.
            if let Err(e) = channel.anchor(*number, Hook::Ingress, place, PREFERENCE) {
                log::warn!("{name}: no anchor for flow rules: {e}");
            }
        }
        let (queue, worker) = queue(config.flower_queue);
        let (report, news) = channel_of_news();
        Ok(Table {
            place,
            interfaces: takes,
            lookup: RouteLookup::new().map_err(|e| e.to_string())?,
            channel,
            hops: HashMap::new(),
            queue,
            news,
            worker: None,
            unstarted: Some((worker, report)),
            next_handle: 0,
        })
    }

    /// Starts the thread that puts rules in.
    pub(super) fn start(&mut self, waker: Arc<Waker>) -> io::Result<()> {
        let Some((worker, report)) = self.unstarted.take() else { return Ok(()) };
        let mut kernel = Kernel::new(Channel::open().map_err(io::Error::other)?);
        let run = move || {
            worker.run(&mut kernel, |flow, what| {
                let handle = flow.rules.first().map_or(0, |rule| rule.handle);
                if report.send((flow.id, handle, what)).is_ok()
                    && let Err(e) = waker.wake()
                {
                    log::error!("waking the event loop: {e}");
                }
            });
        };
        self.worker = Some(std::thread::Builder::new().name("flower".into()).spawn(run)?);
        Ok(())
    }

    /// Does the program have to leave flows to their rules?
    pub(super) fn is_software(&self) -> bool {
        self.place == Place::Software
    }

    /// Names of the interfaces.
    pub(super) fn interfaces(&self) -> String {
        names(&self.interfaces)
    }

    /// Where packets to this address go; `None`: not known (yet), or not by Ethernet.
    pub(super) fn hop(&mut self, to: IpAddr) -> Option<Hop> {
        if let Some(known) = self.hops.get(&to) {
            return *known;
        }
        let found = self.find_hop(to).unwrap_or_else(|e| {
            log::debug!("the way to {to}: {e}");
            None
        });
        self.hops.insert(to, found);
        found
    }

    fn find_hop(&mut self, to: IpAddr) -> Result<Option<Hop>, Error> {
        let Some(way) = self.lookup.way(to)? else { return Ok(None) };
        let (Some(neighbour), Some(own)) =
            (self.channel.neighbour(way.interface, way.neighbour)?, self.channel.ethernet(way.interface)?)
        else {
            return Ok(None);
        };
        Ok(Some(Hop { interface: way.interface, ethernet: (neighbour, own) }))
    }

    /// Ways are looked up anew.
    pub(super) fn forget_hops(&mut self) {
        self.hops.clear();
    }

    /// Asks for the rules of a flow; the handle that they are known by. `None`: the queue is full.
    pub(super) fn insert(
        &mut self,
        id: HandoffId,
        (client, local): (SocketAddr, SocketAddr),
        to: SocketAddr,
        hop: Hop,
    ) -> Option<(Ticket<FlowRules>, u32)> {
        // From 1 on, around and around; the anchors' is the highest.
        self.next_handle = self.next_handle % (ANCHOR - 1) + 1;
        let handle = self.next_handle;
        let rule = |interface| Rule {
            interface,
            hook: Hook::Ingress,
            place: self.place,
            preference: PREFERENCE,
            handle,
            source: client,
            destination: local,
            ends: false,
            rewrite: Rewrite {
                source: None,
                destination: Some(to),
                ethernet: Some(hop.ethernet),
                out: Some(hop.interface),
            },
        };
        let rules = self.interfaces.iter().map(|(number, _)| rule(*number)).collect();
        let ticket = self.queue.insert(FlowRules { id, rules }).ok()?;
        Some((ticket, handle))
    }

    /// Asks for their removal.
    pub(super) fn remove(&self, ticket: &Ticket<FlowRules>) -> Removal {
        self.queue.remove(ticket)
    }

    /// What has become of rules.
    pub(super) fn news(&self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// The queue's counters.
    pub(super) fn counts(&self) -> Counts {
        self.queue.counts()
    }

    /// Ends the thread. Anchors go; rules that are in stay, unless nobody will look after them.
    pub(super) fn close(&mut self, stay: bool) {
        self.queue.close();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
        let removed =
            if stay { self.weigh_anchors() } else { remove_all(&mut self.channel, &self.interfaces) };
        if let Err(e) = removed {
            log::error!("removing flow rules: {e}");
        }
    }

    fn weigh_anchors(&mut self) -> Result<(), Error> {
        let (channel, place) = (&mut self.channel, self.place);
        self.interfaces
            .iter()
            .try_for_each(|(number, _)| channel.weigh_anchor(*number, Hook::Ingress, place, PREFERENCE))
    }
}

fn channel_of_news() -> (Sender<News>, Receiver<News>) {
    channel()
}

fn names(interfaces: &[(u32, String)]) -> String {
    interfaces.iter().map(|(_, name)| name.as_str()).collect::<Vec<_>>().join(", ")
}

/// In this order: first the program does not leave anything to them, then they go, then entries may be given up.
fn forget_rules(
    steer: &mut Steer,
    channel: &mut Channel,
    interfaces: &[(u32, String)],
) -> Result<(), String> {
    let marked: Vec<_> = steer.all_flows().into_iter().filter(|(_, e)| e.flags & FLAG_RULE != 0).collect();
    let mut mark = |marks| {
        for (key, entry) in &marked {
            if let Err(e) = steer.mark_rule(key, entry.flow_id, marks) {
                log::debug!("a flow that an earlier daemon had a rule for: {e}");
            }
        }
    };
    mark(FLAG_RULE);
    if !marked.is_empty() {
        xo_sys::raw::rcu_barrier().map_err(|e| e.to_string())?;
    }
    remove_all(channel, interfaces).map_err(|e| format!("an earlier daemon's rules: {e}"))?;
    mark(0);
    Ok(())
}

fn remove_all(channel: &mut Channel, interfaces: &[(u32, String)]) -> Result<(), Error> {
    interfaces.iter().try_for_each(|(number, _)| channel.remove_all(*number, Hook::Ingress, PREFERENCE))
}
