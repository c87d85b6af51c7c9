//! `xo-peerd status` and `xo-peerd flows`: asks the daemon over its Unix socket, prints a table.

use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::Path;

use serde_json::Value;
use xo_proto::frame::{MAX_LOCAL_MESSAGE, encode_local};
use xo_proto::ipc::{Query, ToDaemon};
use xo_sys::fdpass;

/// Longest packet of an answer, bytes.
const PACKET: usize = 64 << 10;

/// Asks the daemon and returns its JSON text.
pub(crate) fn ask(socket: &Path, query: Query) -> Result<String, Box<dyn Error>> {
    let fd =
        fdpass::connect(socket).map_err(|e| format!("no xo-peerd answers at {}: {e}", socket.display()))?;
    let mut buffer = [0; MAX_LOCAL_MESSAGE];
    let n = encode_local(&ToDaemon::Query(query), &mut buffer)?;
    fdpass::send(fd.as_raw_fd(), &buffer[..n], &[], 0)?;
    let mut text = Vec::new();
    let mut packet = vec![0; PACKET];
    loop {
        match fdpass::recv(fd.as_raw_fd(), &mut packet, 0)? {
            (0, _) if text.is_empty() => return Err("not permitted (see `users` in peerd.toml)".into()),
            (0, _) => return Ok(String::from_utf8(text)?),
            (n, _) => text.extend_from_slice(&packet[..n]),
        }
    }
}

/// The status as a table.
pub(crate) fn table(status: &Value) -> String {
    let mut out = String::new();
    let number = |path: &str| status.pointer(path).map_or_else(String::new, Value::to_string);
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<22}{value}\n"));
    line("node", text(&status["node"]));
    line(
        "connections",
        format!("{} offloaded from here, {} served here", number("/flows_hosted"), number("/flows_served")),
    );
    line("offloads", number("/offloads_total"));
    line("taken over", number("/accepted_total"));
    line("refused", format!("{}{}", number("/refused_total"), reasons(&status["refused_by_reason"])));
    line("lost", format!("{}{}", number("/failed_total"), reasons(&status["failed_by_reason"])));
    line("packets held", number("/held_packets_total"));
    let steering = &status["steering"];
    line("steering", format!("{}, {} entries", text(&steering["mode"]), number("/steering/flow_entries")));
    line(
        "flow rules",
        format!(
            "{}: {}, {} in, {} waiting",
            text(&steering["flower"]),
            text(&steering["flower_on"]),
            steering["rules"],
            steering["queue_depth"]
        ),
    );
    line("tls", text(&status["tls_records"]));
    for peer in status["peers"].as_array().into_iter().flatten() {
        line("peer", format!("{} {} {}", text(&peer["node"]), text(&peer["address"]), text(&peer["state"])));
    }
    for target in status["targets"].as_array().into_iter().flatten() {
        line("target", target_line(target));
    }
    if status["policy_epoch"] != 0 {
        let error = status["policy_error"]
            .as_str()
            .map_or_else(String::new, |e| format!("; the file is broken: {e}"));
        line("policy", format!("{}{error}", status["policy_epoch"]));
    }
    for (name, n) in status["handlers"].as_object().into_iter().flatten() {
        let acceptors =
            status["acceptors"].get(name).map_or_else(String::new, |a| format!(", {a} listening sockets"));
        let tls = text(&status["tls"][name.as_str()]);
        line("handler", format!("{name}: {n} connections{acceptors}, tls: {tls}"));
    }
    for (name, pool) in status["pools"].as_object().into_iter().flatten() {
        for w in pool["workers"].as_array().into_iter().flatten() {
            let value = format!(
                "{name}: process {} {}, {} of {} connections",
                w["pid"],
                text(&w["state"]),
                w["connections"],
                w["capacity"]
            );
            line("worker", value);
        }
    }
    let times = &status["handoff_us"];
    line("hand-off time, µs", format!("{:>8} {:>8}", "p50", "p99"));
    for step in ["queue", "block", "dump", "transfer", "restore", "rewrite", "redirect", "ready"] {
        let t = &times[step];
        line(&format!("  {step}"), format!("{:>8} {:>8}", t["p50"].to_string(), t["p99"].to_string()));
    }
    line("  total", format!("{:>8} {:>8}", times["p50"].to_string(), times["p99"].to_string()));
    out
}

fn target_line(target: &Value) -> String {
    let handlers = target["handlers"].as_object().into_iter().flatten();
    let handlers: Vec<_> = handlers.map(|(name, n)| format!("{name} {n}")).collect();
    let cpu = target["cpu_permille"].as_f64().unwrap_or_default() / 10.0;
    format!(
        "{} {}, {} connections from here, serves {} ({}), CPU {cpu:.1} %",
        text(&target["node"]),
        text(&target["state"]),
        target["connections"],
        target["serves"],
        if handlers.is_empty() { "no handler".into() } else { handlers.join(", ") },
    )
}

/// The flows as a table.
pub(crate) fn flows_table(flows: &Value) -> String {
    let mut out = format!(
        "{:<7}{:<24}{:<24}{:<12}{:<24}{:<11}{:>9}{:>12}\n",
        "ROLE", "CLIENT", "LOCAL", "PEER", "TO", "STATE", "PACKETS", "BYTES"
    );
    for f in flows.as_array().into_iter().flatten() {
        let t = |key: &str| text(&f[key]);
        out.push_str(&format!(
            "{:<7}{:<24}{:<24}{:<12}{:<24}{:<11}{:>9}{:>12}\n",
            t("role"),
            t("client"),
            t("local"),
            t("peer"),
            t("to"),
            t("state"),
            t("packets"),
            t("bytes")
        ));
    }
    out
}

fn text(value: &Value) -> String {
    match value {
        Value::String(s) => s.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn reasons(by_reason: &Value) -> String {
    let all: Vec<_> = by_reason.as_object().into_iter().flatten().map(|(r, n)| format!("{r} {n}")).collect();
    if all.is_empty() { String::new() } else { format!(" ({})", all.join(", ")) }
}
