//! The kernel's own counters of a namespace.

use std::collections::BTreeMap;
use std::fs;

use crate::Bed;

/// TCP counters of `/proc/net/snmp` and `/proc/net/netstat`, by name; with the node before it for those of a bed.
#[derive(Clone, Debug, Default)]
pub struct Counters(BTreeMap<String, i64>);

impl Counters {
    /// Those of the calling thread's namespace.
    ///
    /// # Panics
    /// When /proc is not readable.
    #[must_use]
    pub fn here() -> Counters {
        let mut all = BTreeMap::new();
        for file in ["snmp", "netstat"] {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("counters");
            let lines: Vec<_> = text.lines().collect();
            for pair in lines.chunks(2).filter(|p| p[0].starts_with("Tcp")) {
                let values = pair[1].split_whitespace().skip(1).filter_map(|v| v.parse().ok());
                all.extend(pair[0].split_whitespace().skip(1).map(str::to_owned).zip(values));
            }
        }
        Counters(all)
    }

    /// Those of all nodes of a bed, added up; trouble is told by node.
    #[must_use]
    pub fn of(bed: &Bed) -> Counters {
        let each = bed.nodes().into_iter().flat_map(|node| {
            let here = bed.on(&node, Counters::here).0;
            here.into_iter().map(move |(name, value)| (format!("{node} {name}"), value))
        });
        Counters(each.collect())
    }

    /// What has been counted since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Counters) -> Counters {
        Counters(
            self.0
                .iter()
                .map(|(k, v)| (k.clone(), v - earlier.0.get(k).copied().unwrap_or_default()))
                .collect(),
        )
    }

    /// One counter, of all nodes together; 0 if the kernel has none of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> i64 {
        let is_it = |full: &str| full.rsplit(' ').next() == Some(name);
        self.0.iter().filter(|(full, _)| is_it(full)).map(|(_, value)| value).sum()
    }

    /// One counter of one node.
    #[must_use]
    pub fn get_on(&self, node: &str, name: &str) -> i64 {
        self.0.get(&format!("{node} {name}")).copied().unwrap_or_default()
    }

    /// Resets sent.
    #[must_use]
    pub fn resets(&self) -> i64 {
        self.get("OutRsts")
    }

    /// No reset ended anything. What a server's stack says of a connection that has left, to a packet that came in the last moment,
    /// is counted by it and goes no further. A tail loss probe (RFC 8985, 7) of a server's FIN, sent when the machine is busy, may lead to
    /// a reset between two ends that are both done: the client's stack resets when the ACK that was sent after it comes first, as it can on
    /// a virtual interface, which has a queue for each processor; the server's, when its connection is gone with the first ACK, and a
    /// client in TIME-WAIT acknowledges the probe as well. Neither counts as a connection of the client that was reset or aborted.
    ///
    /// # Panics
    /// When there was one.
    pub fn no_reset(&self, bed: &Bed) {
        let servers = bed.servers();
        let of_client = self.get_on("client", "OutRsts");
        println!("resets: {}, of the client: {of_client}", self.resets());
        assert_eq!(self.get_on("client", "EstabResets"), 0, "{}", self.troubles());
        for node in &servers {
            let [sent, probes] = ["OutRsts", "TCPLossProbes"].map(|name| self.get_on(node, name));
            let muted = i64::try_from(bed.status(node, "/steering/packets/muted")).expect("a few");
            assert!(sent <= muted + probes, "{node}: {muted} muted: {}", self.troubles());
        }
        let aborted = self.on_client_that_begins_with("TCPAbort");
        let probes: i64 = servers.iter().map(|n| self.get_on(n, "TCPLossProbes")).sum();
        assert!(of_client <= probes && aborted == 0, "{aborted} aborted: {}", self.troubles());
    }

    /// Counters of the client whose names begin like this, together.
    fn on_client_that_begins_with(&self, name: &str) -> i64 {
        let is_it = |full: &str| full.strip_prefix("client ").is_some_and(|n| n.starts_with(name));
        self.0.iter().filter(|(full, _)| is_it(full)).map(|(_, value)| value).sum()
    }

    /// Segments sent again.
    #[must_use]
    pub fn retransmissions(&self) -> i64 {
        self.get("RetransSegs")
    }

    /// Segments sent again because the kernel took them for lost. The tail loss probe (RFC 8985, 7) that it sends when the
    /// machine is busy with other things, wherever a connection is served, is not one of them.
    #[must_use]
    pub fn losses(&self) -> i64 {
        (self.retransmissions() - self.get("TCPLossProbes")).max(0)
    }

    /// Counters that are not zero and whose name says that something went wrong.
    #[must_use]
    pub fn troubles(&self) -> String {
        let bad =
            ["Retrans", "Timeout", "Rst", "Drop", "Abort", "PAWS", "Loss", "OFO", "Err", "Challenge", "Zero"];
        let is_bad = |name: &str| bad.iter().any(|b| name.contains(b));
        let all = self.0.iter().filter(|(k, v)| **v != 0 && is_bad(k));
        all.map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")
    }
}
