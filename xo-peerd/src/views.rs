//! What `xo-peerd status` and `xo-peerd flows` show of the engine.

use serde_json::{Value, json};
use xo_bpf_abi::PATH_NAMES;
use xo_proto::handoff::TargetState;
use xo_proto::reason::ALL;
use xo_proto::slot::Counter;

use crate::config::{Handler, HandlerMode};
use crate::engine::Engine;
use crate::metrics::{Live, PeerView};
use crate::records::Layer;
use crate::restore::Entry;
use crate::target::Served;

/// Names of the library's counters beyond the reasons.
const LIBRARY: [(Counter, &str); 5] = [
    (Counter::Accepted, "accepted"),
    (Counter::Local, "local"),
    (Counter::Asked, "asked"),
    (Counter::Delivered, "delivered"),
    (Counter::IoUring, "io_uring"),
];

impl Engine {
    /// The present state, for the metrics.
    pub(crate) fn live(&self) -> Live {
        let hosted = self.hosted.values().filter(|f| f.is_away()).count() as u64;
        let is_here = |s: &Served| s.state() == TargetState::Served && !s.origin.here;
        let served = self.served.values().filter(|s| is_here(s)).count() as u64;
        let counters = self.steer.counters();
        Live {
            node: self.config.node.clone(),
            flows_active: hosted + served,
            flows_hosted: hosted,
            flows_served: served,
            steering_mode: self.steer.mode().to_owned(),
            flow_entries: self.steer.flow_entries(),
            flower: self.flower.view(),
            counters: PATH_NAMES.iter().map(|n| (*n).to_owned()).zip(counters).collect(),
            library: self.library_counters(),
            peers: self.peer_views(),
            handlers: self.handler_views(),
            acceptors: self.acceptor_views(),
            tls: self.tls_views(),
            tls_records: self.records.name(),
            pools: self.pools.views(),
            targets: self.target_views(),
            policy: self.policy_view(),
        }
    }

    /// One entry for each connection that is offloaded from here or served here.
    pub(crate) fn flows_json(&self) -> String {
        let mut flows = Vec::with_capacity(self.hosted.len() + self.served.len());
        for (id, f) in &self.hosted {
            let entry = self.steer.flow(&f.key);
            flows.push(json!({
                "role": "host",
                "id": id,
                "client": f.client.to_string(),
                "local": f.local.to_string(),
                "peer": f.target,
                "to": f.to.map(|a| a.to_string()),
                "state": format!("{:?}", f.state()).to_lowercase(),
                "packets": entry.map(|e| e.packets),
                "bytes": entry.map(|e| e.bytes),
                "rule": self.flower.stage(*id),
            }));
        }
        for ((node, id), s) in &self.served {
            let counted = match &s.entry {
                Some(Entry::Rewrite(k)) => self.steer.rewrite_entry(k).map(|e| (e.packets, e.bytes)),
                Some(Entry::Deliver(k)) => self.steer.flow(k).map(|e| (e.packets, e.bytes)),
                None => None,
            };
            flows.push(json!({
                "role": "target",
                "id": id,
                "client": s.client.to_string(),
                "local": s.local.to_string(),
                "peer": &**node,
                "to": s.host.to_string(),
                "handler": s.handler,
                "tls": s.layer.as_ref().map(Layer::name),
                "state": format!("{:?}", s.state()).to_lowercase(),
                "home": &*s.origin.node,
                "packets": counted.map(|c| c.0),
                "bytes": counted.map(|c| c.1),
            }));
        }
        Value::Array(flows).to_string()
    }

    fn library_counters(&self) -> Vec<(String, u64)> {
        let tables: Vec<_> = self.libraries.iter().filter_map(|(_, l)| l.slots.as_ref()).collect();
        let sum = |i: usize| tables.iter().map(|t| t.counter(i)).sum::<u64>() + self.past_counters[i];
        let reasons = ALL.iter().map(|r| (r.name().to_owned(), sum(*r as usize)));
        let others = LIBRARY.iter().map(|(c, name)| ((*name).to_owned(), sum(*c as usize)));
        others.chain(reasons).collect()
    }

    fn peer_views(&self) -> Vec<PeerView> {
        let dialled = self.dials.iter().map(|(node, dial)| {
            let up = self.connection_to(node).is_some();
            let state = if up { "connected" } else { "away" };
            PeerView { name: node.clone(), address: dial.address.to_string(), state: state.into() }
        });
        let accepted = self.peers.iter().filter(|(_, p)| p.dialled.is_none()).map(|(_, p)| {
            let state = if p.usable() { "connected" } else { "greeting" };
            PeerView { name: p.name(), address: String::new(), state: state.into() }
        });
        dialled.chain(accepted).collect()
    }

    fn handler_views(&self) -> Vec<(String, u64)> {
        let count = |name: &str| self.served.values().filter(|s| s.handler == name).count() as u64;
        self.config.handlers.iter().map(|h| (h.name.clone(), count(&h.name))).collect()
    }

    fn acceptor_views(&self) -> Vec<(String, u64)> {
        let attached = |h: &Handler| match h.mode {
            HandlerMode::Attach { port, .. } => Some((h.name.clone(), self.acceptors_on(port))),
            HandlerMode::Exec { .. } | HandlerMode::Pool { .. } => None,
        };
        self.config.handlers.iter().filter_map(attached).collect()
    }

    fn tls_views(&self) -> Vec<(String, &'static str)> {
        let how = |h: &Handler| match h.mode {
            HandlerMode::Attach { port, tls } => self.tls_on(port, tls),
            HandlerMode::Exec { .. } | HandlerMode::Pool { .. } => self.records.name(),
        };
        self.config.handlers.iter().map(|h| (h.name.clone(), how(h))).collect()
    }
}
