//! Counters and hand-off times.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};
use xo_proto::reason::{ALL, REASONS, Reason};

use crate::flower::FlowerView;
use crate::pool::{PoolView, WorkerView};
use crate::reload::PolicyView;
use crate::targets::TargetView;

/// Times of one hand-off, ns, as `status` shows them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Steps {
    /// From the library's decision to the daemon's receipt.
    pub(crate) queue_ns: u64,
    /// HOLD entry.
    pub(crate) block_ns: u64,
    /// Dump of the TCP state.
    pub(crate) dump_ns: u64,
    /// `BEGIN_OFFLOAD` sent to `TARGET_READY` received; includes the next two.
    pub(crate) transfer_ns: u64,
    /// Restore, at the target.
    pub(crate) restore_ns: u64,
    /// Source rewrite entry, at the target.
    pub(crate) rewrite_ns: u64,
    /// Held packets replayed, HOLD turned into REDIRECT.
    pub(crate) redirect_ns: u64,
    /// From there to the handler having the socket.
    pub(crate) ready_ns: u64,
    /// Decision to handler.
    pub(crate) total_ns: u64,
}

impl Steps {
    fn named(&self) -> [(&'static str, u64); STEPS] {
        [
            ("queue", self.queue_ns),
            ("block", self.block_ns),
            ("dump", self.dump_ns),
            ("transfer", self.transfer_ns),
            ("restore", self.restore_ns),
            ("rewrite", self.rewrite_ns),
            ("redirect", self.redirect_ns),
            ("ready", self.ready_ns),
            ("total", self.total_ns),
        ]
    }
}

const STEPS: usize = 9;

/// Between which machines a connection moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From its home to a target.
    Outbound,
    /// From a target to another.
    Onward,
    /// From a target to its home.
    Inbound,
}

const KINDS: [(Kind, &str); 3] =
    [(Kind::Outbound, "outbound"), (Kind::Onward, "onward"), (Kind::Inbound, "inbound")];

/// A peer, for `status`.
#[derive(Clone, Debug)]
pub(crate) struct PeerView {
    /// Node name.
    pub(crate) name: String,
    /// Peer address, if we dialled it.
    pub(crate) address: String,
    /// "connected", "away" or "greeting".
    pub(crate) state: String,
}

/// What the engine knows at the moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Live {
    /// Node name.
    pub(crate) node: String,
    /// Connections offloaded from here or served here.
    pub(crate) flows_active: u64,
    /// Of these, offloaded from here.
    pub(crate) flows_hosted: u64,
    /// Of these, served here.
    pub(crate) flows_served: u64,
    /// "tcx", "clsact", "xdp-native" or "xdp-generic".
    pub(crate) steering_mode: String,
    /// Entries in the flow and rewrite tables.
    pub(crate) flow_entries: u64,
    /// Flow rules.
    pub(crate) flower: FlowerView,
    /// Packets by path.
    pub(crate) counters: Vec<(String, u64)>,
    /// What libraries counted.
    pub(crate) library: Vec<(String, u64)>,
    /// Peers.
    pub(crate) peers: Vec<PeerView>,
    /// Connections served, by handler.
    pub(crate) handlers: Vec<(String, u64)>,
    /// Listening sockets of processes that take connections, by `attach` handler.
    pub(crate) acceptors: Vec<(String, u64)>,
    /// How each handler serves connections that come with TLS.
    pub(crate) tls: Vec<(String, &'static str)>,
    /// Who does the records for those that are programs of their own: "kernel_tls12", "kernel", "library".
    pub(crate) tls_records: &'static str,
    /// Pools of workers.
    pub(crate) pools: Vec<PoolView>,
    /// Machines that connections may go to.
    pub(crate) targets: Vec<TargetView>,
    /// The policy in force.
    pub(crate) policy: PolicyView,
}

/// The daemon's own counters.
pub(crate) struct Metrics {
    /// By [`Kind`].
    moved: [AtomicU64; KINDS.len()],
    accepted: AtomicU64,
    returns: AtomicU64,
    held: AtomicU64,
    refused: [AtomicU64; REASONS],
    failed: [AtomicU64; REASONS],
    /// By [`Kind`], then by step.
    times: Mutex<[Vec<Histogram<u64>>; KINDS.len()]>,
}

impl Default for Metrics {
    fn default() -> Self {
        // Up to 60 s with three significant digits; the bounds are constants that the library accepts.
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3).ok();
        Metrics {
            moved: Default::default(),
            accepted: AtomicU64::new(0),
            returns: AtomicU64::new(0),
            held: AtomicU64::new(0),
            refused: std::array::from_fn(|_| AtomicU64::new(0)),
            failed: std::array::from_fn(|_| AtomicU64::new(0)),
            times: Mutex::new(std::array::from_fn(|_| {
                histogram.clone().map(|h| vec![h; STEPS]).unwrap_or_default()
            })),
        }
    }
}

impl Metrics {
    /// All zero.
    #[must_use]
    pub(crate) fn new() -> Metrics {
        Metrics::default()
    }

    /// A connection left.
    pub(crate) fn offload(&self, kind: Kind, steps: &Steps) {
        self.moved[kind as usize].fetch_add(1, Ordering::Relaxed);
        let mut times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        for (histogram, (_, ns)) in times[kind as usize].iter_mut().zip(steps.named()) {
            histogram.saturating_record(ns);
        }
    }

    /// A connection of this machine has come home.
    pub(crate) fn returned(&self) {
        self.returns.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection of another host was handed to a handler here.
    pub(crate) fn accepted(&self) {
        self.accepted.fetch_add(1, Ordering::Relaxed);
    }

    /// A hand-off did not take place; the host served the request.
    pub(crate) fn refused(&self, reason: Reason) {
        if let Some(counter) = self.refused.get(reason as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A connection was lost.
    pub(crate) fn failed(&self, reason: Reason) {
        if let Some(counter) = self.failed.get(reason as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// So many packets were held for replay.
    pub(crate) fn held(&self, packets: u64) {
        self.held.fetch_add(packets, Ordering::Relaxed);
    }

    /// `xo-peerd status --json`.
    #[must_use]
    pub(crate) fn status_json(&self, live: &Live) -> String {
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let (refused, refused_total) = by_reason(&self.refused);
        let (failed, failed_total) = by_reason(&self.failed);
        let peers: Vec<Value> = live
            .peers
            .iter()
            .map(|p| json!({"node": p.name, "address": p.address, "state": p.state}))
            .collect();
        json!({
            "node": live.node,
            "version": env!("CARGO_PKG_VERSION"),
            "flows_active": live.flows_active,
            "flows_hosted": live.flows_hosted,
            "flows_served": live.flows_served,
            "offloads_total": load(&self.moved[Kind::Outbound as usize]),
            "onward_total": load(&self.moved[Kind::Onward as usize]),
            "sent_home_total": load(&self.moved[Kind::Inbound as usize]),
            "accepted_total": load(&self.accepted),
            "returns_total": load(&self.returns),
            "refused_total": refused_total,
            "refused_by_reason": refused,
            "failed_total": failed_total,
            "failed_by_reason": failed,
            "held_packets_total": load(&self.held),
            "handoff_us": self.times_json(Kind::Outbound),
            "onward_us": self.times_json(Kind::Onward),
            "inbound_us": self.times_json(Kind::Inbound),
            "steering": {
                "mode": live.steering_mode,
                "hardware": live.flower.hardware,
                "flower": live.flower.mode,
                "flower_on": live.flower.about,
                "rules": live.flower.rules,
                "rules_inserted": live.flower.inserted,
                "rules_refused": live.flower.refused,
                "flow_entries": live.flow_entries,
                "queue_depth": live.flower.depth,
                "queue_cancelled": live.flower.cancelled,
                "queue_full": live.flower.full,
                "packets": object(&live.counters),
            },
            "library": object(&live.library),
            "handlers": object(&live.handlers),
            "acceptors": object(&live.acceptors),
            "tls": live.tls.iter().map(|(name, how)| (name.clone(), json!(how))).collect::<Map<_, _>>(),
            "tls_records": live.tls_records,
            "pools": live.pools.iter().map(|p| (p.handler.clone(), pool_json(p))).collect::<Map<_, _>>(),
            "peers": peers,
            "targets": live.targets.iter().map(target_json).collect::<Vec<_>>(),
            "policy_epoch": live.policy.epoch,
            "policy_loaded_at": live.policy.loaded_at,
            "policy_errors_total": live.policy.errors,
            "policy_error": live.policy.error,
        })
        .to_string()
    }

    fn times_json(&self, kind: Kind) -> Value {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let us = |ns: u64| json!((ns as f64 / 100.0).round() / 10.0);
        let at = |h: &Histogram<u64>, q| if h.is_empty() { json!(0) } else { us(h.value_at_quantile(q)) };
        let mut all = Map::new();
        for (histogram, (name, _)) in times[kind as usize].iter().zip(Steps::default().named()) {
            let (p50, p99) = (at(histogram, 0.5), at(histogram, 0.99));
            if name == "total" {
                all.insert("samples".into(), json!(histogram.len()));
                all.insert("p50".into(), p50);
                all.insert("p99".into(), p99);
                all.insert("max".into(), if histogram.is_empty() { json!(0) } else { us(histogram.max()) });
            } else {
                all.insert(name.into(), json!({"p50": p50, "p99": p99}));
            }
        }
        Value::Object(all)
    }

    /// Prometheus text format 0.0.4.
    #[must_use]
    pub(crate) fn prometheus(&self, live: &Live) -> String {
        let mut text = String::new();
        let load = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
            for (labels, value) in samples {
                text.push_str(&format!("{name}{labels} {value}\n"));
            }
        };
        let one = |n: u64| vec![(String::new(), n as f64)];
        let labelled = |label: &str, all: &[(String, u64)]| -> Vec<(String, f64)> {
            all.iter().map(|(name, n)| (format!("{{{label}=\"{name}\"}}"), *n as f64)).collect()
        };
        let reasons = |all: &[AtomicU64]| -> Vec<(String, u64)> {
            ALL.iter().zip(all).map(|(r, n)| (r.name().to_owned(), load(n))).collect()
        };
        let moved: Vec<_> =
            KINDS.iter().zip(&self.moved).map(|((_, name), n)| ((*name).to_owned(), load(n))).collect();
        let offloads = load(&self.moved[Kind::Outbound as usize]);
        metric("xo_offloads_total", "counter", "Connections of this machine handed over.", &one(offloads));
        metric(
            "xo_moves_total",
            "counter",
            "Connections handed over, by kind: own, guests' to another target, guests' to their home.",
            &labelled("kind", &moved),
        );
        metric("xo_accepted_total", "counter", "Connections taken over.", &one(load(&self.accepted)));
        metric("xo_returns_total", "counter", "Connections that came home.", &one(load(&self.returns)));
        let refused = reasons(&self.refused);
        metric(
            "xo_refused_total",
            "counter",
            "Hand-offs not made, by reason.",
            &labelled("reason", &refused),
        );
        let failed = reasons(&self.failed);
        metric("xo_failed_total", "counter", "Connections lost, by reason.", &labelled("reason", &failed));
        metric("xo_held_packets_total", "counter", "Packets held and replayed.", &one(load(&self.held)));
        let flows = [("hosted".to_owned(), live.flows_hosted), ("served".to_owned(), live.flows_served)];
        metric(
            "xo_flows",
            "gauge",
            "Connections offloaded from here, served here.",
            &labelled("role", &flows),
        );
        metric("xo_flow_entries", "gauge", "Entries in the steering tables.", &one(live.flow_entries));
        let flower = &live.flower;
        for (name, kind, help, value) in [
            ("xo_rules", "gauge", "Flows that a flow rule redirects.", flower.rules),
            ("xo_rules_hardware", "gauge", "1: a NIC takes flow rules.", flower.hardware.into()),
            ("xo_rules_inserted_total", "counter", "Flow rules put in.", flower.inserted),
            ("xo_rules_refused_total", "counter", "Flow rules not taken.", flower.refused),
            ("xo_rule_queue_depth", "gauge", "Flow rule commands that wait.", flower.depth),
            (
                "xo_rule_queue_cancelled_total",
                "counter",
                "Insertions cancelled in the queue.",
                flower.cancelled,
            ),
            ("xo_rule_queue_full_total", "counter", "Flows for which the queue had no room.", flower.full),
        ] {
            metric(name, kind, help, &one(value));
        }
        metric("xo_packets_total", "counter", "Packets by path.", &labelled("path", &live.counters));
        metric("xo_library_total", "counter", "What libraries counted.", &labelled("event", &live.library));
        metric(
            "xo_handler_flows",
            "gauge",
            "Connections served, by handler.",
            &labelled("handler", &live.handlers),
        );
        metric(
            "xo_handler_acceptors",
            "gauge",
            "Listening sockets of processes that take connections, by handler.",
            &labelled("handler", &live.acceptors),
        );
        metric(
            "xo_tls_records",
            "gauge",
            "Who does the records of connections with TLS for exec and pool handlers.",
            &labelled("tls", &[(live.tls_records.to_owned(), 1)]),
        );
        let ready = |p: &PoolView| p.workers.iter().filter(|w| w.ready).count() as u64;
        metric("xo_pool_workers", "gauge", "Workers that take connections.", &of_pools(&live.pools, &ready));
        metric(
            "xo_pool_hellos_total",
            "counter",
            "Workers that have come so far.",
            &of_pools(&live.pools, &|p| p.hellos),
        );
        metric(
            "xo_pool_broken_total",
            "counter",
            "Workers' channels closed because of a broken message.",
            &of_pools(&live.pools, &|p| p.broken),
        );
        metric(
            "xo_pool_worker_connections",
            "gauge",
            "Connections of a worker.",
            &of_workers(&live.pools, &|w| w.connections),
        );
        metric(
            "xo_pool_worker_capacity",
            "gauge",
            "Connections that a worker can hold.",
            &of_workers(&live.pools, &|w| w.capacity),
        );
        let of_targets = |value: &dyn Fn(&TargetView) -> f64| -> Vec<(String, f64)> {
            live.targets.iter().map(|t| (format!("{{target=\"{}\"}}", t.name), value(t))).collect()
        };
        metric(
            "xo_target_up",
            "gauge",
            "1 for a target that is given connections, 0 for one that drains or is down.",
            &of_targets(&|t| f64::from(u8::from(t.state == "up"))),
        );
        metric(
            "xo_target_connections",
            "gauge",
            "Connections of this machine at a target.",
            &of_targets(&|t| t.connections as f64),
        );
        metric(
            "xo_target_serves",
            "gauge",
            "Connections that a target serves, whoever sent them, by its last report.",
            &of_targets(&|t| t.load.connections.into()),
        );
        metric(
            "xo_target_cpu_ratio",
            "gauge",
            "How busy a target's processors are, 0 to 1, by its last report.",
            &of_targets(&|t| f64::from(t.load.cpu_permille) / 1000.0),
        );
        metric(
            "xo_target_handler_serves",
            "gauge",
            "Connections that other machines sent to a target, by the handler that serves them, by its last report.",
            &of_handlers(&live.targets),
        );
        metric(
            "xo_policy_epoch",
            "gauge",
            "Policies that this daemon has had.",
            &one(live.policy.epoch.into()),
        );
        metric(
            "xo_policy_loaded_timestamp_seconds",
            "gauge",
            "Since when the policy in force is.",
            &one(live.policy.loaded_at),
        );
        metric(
            "xo_policy_errors_total",
            "counter",
            "Times that the policy file was found broken.",
            &one(live.policy.errors),
        );
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let mut samples = Vec::new();
        for ((_, kind), times) in KINDS.iter().zip(times.iter()) {
            for (h, (name, _)) in times.iter().zip(Steps::default().named()) {
                let labels = format!("kind=\"{kind}\",step=\"{name}\"");
                for q in [0.5, 0.9, 0.99] {
                    let seconds = if h.is_empty() { 0.0 } else { h.value_at_quantile(q) as f64 / 1e9 };
                    samples.push((format!("{{{labels},quantile=\"{q}\"}}"), seconds));
                }
                let count = h.len() as f64;
                let sum = if h.is_empty() { 0.0 } else { h.mean() * count / 1e9 };
                samples.push((format!("_sum{{{labels}}}"), sum));
                samples.push((format!("_count{{{labels}}}"), count));
            }
        }
        metric("xo_handoff_seconds", "summary", "Hand-off time by step.", &samples);
        text
    }
}

fn of_handlers(targets: &[TargetView]) -> Vec<(String, f64)> {
    let each = targets.iter().flat_map(|t| t.load.handlers.iter().map(move |h| (t, h)));
    each.map(|(t, h)| (format!("{{target=\"{}\",handler=\"{}\"}}", t.name, h.name), f64::from(h.connections)))
        .collect()
}

fn by_reason(counters: &[AtomicU64; REASONS]) -> (Value, u64) {
    let counts: Vec<(String, u64)> = ALL
        .iter()
        .zip(counters)
        .map(|(r, c)| (r.name().to_owned(), c.load(Ordering::Relaxed)))
        .filter(|(_, n)| *n > 0)
        .collect();
    (object(&counts), counts.iter().map(|(_, n)| n).sum())
}

fn target_json(target: &TargetView) -> Value {
    json!({
        "node": target.name,
        "address": target.address,
        "state": target.state,
        "connections": target.connections,
        "serves": target.load.connections,
        "cpu_permille": target.load.cpu_permille,
        "handlers": target.load.handlers.iter().map(|h| (h.name.clone(), json!(h.connections))).collect::<Map<_, _>>(),
    })
}

fn pool_json(pool: &PoolView) -> Value {
    let worker = |w: &WorkerView| {
        json!({
            "pid": w.pid,
            "state": if w.ready { "ready" } else { "greeting" },
            "connections": w.connections,
            "capacity": w.capacity,
            "taken_total": w.taken,
        })
    };
    json!({
        "ready": pool.workers.iter().filter(|w| w.ready).count(),
        "hellos_total": pool.hellos,
        "broken_total": pool.broken,
        "workers": pool.workers.iter().map(worker).collect::<Vec<_>>(),
    })
}

/// Samples of the pools: with the labels of a pool, or of each of its workers.
fn of_pools(pools: &[PoolView], value: &dyn Fn(&PoolView) -> u64) -> Vec<(String, f64)> {
    pools.iter().map(|p| (format!("{{handler=\"{}\"}}", p.handler), value(p) as f64)).collect()
}

fn of_workers(pools: &[PoolView], value: &dyn Fn(&WorkerView) -> u32) -> Vec<(String, f64)> {
    let of_one = |p: &PoolView| {
        let label = |w: &WorkerView| format!("{{handler=\"{}\",worker=\"{}\"}}", p.handler, w.pid);
        p.workers.iter().map(|w| (label(w), value(w).into())).collect::<Vec<_>>()
    };
    pools.iter().flat_map(of_one).collect()
}

fn object(pairs: &[(String, u64)]) -> Value {
    Value::Object(pairs.iter().map(|(name, n)| (name.clone(), json!(n))).collect())
}

#[cfg(test)]
mod tests {
    use xo_proto::wire::{HandlerLoad, Load};

    use super::*;

    #[test]
    fn the_promised_keys_are_there() {
        let metrics = Metrics::new();
        metrics.offload(Kind::Outbound, &Steps { queue_ns: 1000, total_ns: 50_000, ..Steps::default() });
        metrics.refused(Reason::NoHandler);
        let live =
            Live { node: "t1".into(), flow_entries: 3, steering_mode: "tcx".into(), ..Live::default() };
        let v: Value = serde_json::from_str(&metrics.status_json(&live)).expect("JSON");
        for key in
            ["node", "flows_active", "offloads_total", "returns_total", "refused_total", "failed_total"]
        {
            assert!(v.get(key).is_some(), "{key}");
        }
        for key in ["mode", "hardware", "flow_entries", "queue_depth", "queue_cancelled"] {
            assert!(v["steering"].get(key).is_some(), "{key}");
        }
        assert_eq!((&v["refused_total"], &v["refused_by_reason"]["no_handler"]), (&json!(1), &json!(1)));
        let total = v["handoff_us"]["p50"].as_f64().expect("a number");
        assert!((49.9..50.2).contains(&total), "{total}");
        assert_eq!(v["handoff_us"]["samples"], 1);
        for step in ["queue", "block", "dump", "transfer", "restore", "rewrite", "redirect", "ready"] {
            assert!(v["handoff_us"][step]["p99"].is_number(), "{step}");
        }
    }

    #[test]
    fn a_targets_load_is_shown() {
        let handlers = vec![HandlerLoad { name: "web".into(), connections: 3 }];
        let target = TargetView {
            name: "t1".into(),
            address: "10.0.0.1:7400".into(),
            state: "up",
            connections: 2,
            load: Load { connections: 5, cpu_permille: 125, handlers },
        };
        let live = Live { targets: vec![target], ..Live::default() };
        let text = Metrics::new().prometheus(&live);
        for line in [
            "xo_target_connections{target=\"t1\"} 2",
            "xo_target_serves{target=\"t1\"} 5",
            "xo_target_cpu_ratio{target=\"t1\"} 0.125",
            "xo_target_handler_serves{target=\"t1\",handler=\"web\"} 3",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}: {text}");
        }
        let status: Value = serde_json::from_str(&Metrics::new().status_json(&live)).expect("JSON");
        let shown = &status["targets"][0];
        assert_eq!((&shown["serves"], &shown["handlers"]["web"]), (&json!(5), &json!(3)));
        let table = crate::status::table(&status);
        assert!(table.contains("t1 up, 2 connections from here, serves 5 (web 3), CPU 12.5 %"), "{table}");
    }

    #[test]
    fn prometheus_text_is_well_formed() {
        let metrics = Metrics::new();
        metrics.refused(Reason::TableFull);
        let workers = vec![WorkerView { pid: 7, ready: true, connections: 2, capacity: 4, taken: 9 }];
        let pools = vec![PoolView { handler: "web".into(), workers, hellos: 3, broken: 1 }];
        let text = metrics.prometheus(&Live { pools, ..Live::default() });
        assert!(text.contains("\nxo_pool_workers{handler=\"web\"} 1\n"), "{text}");
        assert!(text.contains("\nxo_pool_worker_connections{handler=\"web\",worker=\"7\"} 2\n"), "{text}");
        assert!(text.contains("\nxo_refused_total{reason=\"table_full\"} 1\n"), "{text}");
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').expect("name and value");
            assert!(name.starts_with("xo_") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
}
