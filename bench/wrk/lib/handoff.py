"""Hand-offs of each kind, one connection at a time, in alternating rounds with the naive probe.

Each round raises a fresh bed. XO's time runs from the library's decision in the server that has the connection to the moment
when the next server has been handed the socket, so it includes two things that the probe does not do: asking the daemon,
and handing over. What hand-offs cost is measured beside it (handoff_cost.py).
"""

import os
import re
import statistics
import subprocess
import typing

import cluster
import handoff_cost
import serving

# Steps of `xo-peerd status`, what they are, and the paper's Table 3 (microseconds) where it has the step.
STEPS = [
    ("queue", "library to daemon", None),
    ("block", "block the flow", 5),
    ("dump", "dump the TCP state", 15),
    ("transfer", "BEGIN_OFFLOAD to TARGET_READY, the next two included", 404),
    ("restore", "  restore the TCP state", 42),
    ("rewrite", "  source rewrite", 95),
    ("redirect", "redirect", 4),
    ("ready", "HOST_READY to the handler", 110),
]
PAPER_TOTAL_US = 541


class System(typing.NamedTuple):
    """What is measured."""

    mode: str
    # Whether the peer channel is encrypted, and the client's connection.
    peer_tls: bool = False
    tls: bool = False
    # The daemons poll, as by default.
    polls: bool = True

    def title(self):
        """Its column's head."""
        said = [(self.polls, "no polling"), (not self.peer_tls, "TLS between daemons"), (not self.tls, "HTTPS")]
        return ", ".join([self.mode, *(text for usual, text in said if not usual)])


SYSTEMS = [
    System("early"),
    System("early", polls=False),
    System("strict"),
    System("early", peer_tls=True),
    # Secrets go by an encrypted channel only.
    System("early", peer_tls=True, tls=True),
]
# Kind: who hands over, where its status has the times, and what a connection asks for before: each prefix is a node's.
KINDS = {
    "outbound": ("host", "handoff_us", ["/t1/"]),
    "t2t": ("t1", "onward_us", ["/t1/", "/t2/"]),
    "inbound": ("t1", "inbound_us", ["/t1/", "/home/"]),
}
NODE_OF = {"/t1/": "t1", "/t2/": "t2", "/home/": "host"}
PROBE = re.compile(
    r"N=\d+ block (\S+) dump (\S+) rpc (\S+) \(T: restore (\S+) rewrite (\S+)\)"
    r" redirect\+ready (\S+) disconnect (\S+) total (\S+) us"
)


def write_files(bed):
    """A policy by which each prefix is a node's, and objects there."""
    targets = "".join(f'{t} = "{cluster.address(t)}:{cluster.PEER_PORT}"\n' for t in bed.targets)
    rules = ""
    for prefix, node in NODE_OF.items():
        (bed.directory / "www" / prefix.strip("/")).symlink_to("img")
        to = "local" if node == "host" else node
        rules += f'[[rule]]\npath_prefix = "{prefix}"\nto = ["{to}"]\nhandler = "web"\n'
    (bed.directory / "policy.toml").write_text(f"listen = [80, 443]\n[targets]\n{targets}{rules}")


def ask(bed, count, prefixes, scheme="http"):
    """So many connections, one after the other, each with one request for each of these; checks who answered."""
    paths = [f"{prefix}1k" for prefix in prefixes]
    client = ["python3", cluster.ROOT / "bench/wrk/lib/connect_and_get.py", count, scheme, cluster.address("host"), *paths]
    expected = " ".join(NODE_OF[prefix] for prefix in prefixes)
    lines = bed.run("client", client).splitlines()
    if len(lines) != count or any(line != expected for line in lines):
        wrong = next((line for line in lines if line != expected), "nobody")
        cluster.die(f"{' '.join(paths)}: answered by {wrong}, not by {expected}: {bed.status('host')}")


def one_round(system, count, cost):
    """Hands `count` connections of each kind over: times by kind; and, with `cost`, what it costs."""
    with cluster.Bed(2, tls=system.peer_tls) as bed:
        write_files(bed)
        serving.write_certificate(bed)
        bed.limits = "" if system.polls else "spin_us = 0"
        bed.everything(order=system.mode, at_host=serving.https_of(bed))
        scheme = "https" if system.tls else "http"
        # Each bed warms up: channels, caches, spare sockets.
        ask(bed, 20, ["/t1/", "/t2/", "/home/"], scheme)
        times = {}
        for kind, (node, key, prefixes) in KINDS.items():
            already = bed.status(node)[key]["samples"]
            ask(bed, count, prefixes, scheme)
            times[kind] = bed.status(node)[key]
            if times[kind]["samples"] < already + count:
                cluster.die(f"{kind}: not all of {count} moved: {bed.status(node)['refused_by_reason']}")
        return times, handoff_cost.measure(bed, count, ask) if cost else None


def probe_round(directory, count, prefix=()):
    """The probe's means, microseconds; each line has those of its last 200. None when it fails."""
    command = [*prefix, "bash", f"{directory}/run", str(count)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    lines = [m for m in map(PROBE.search, result.stdout.splitlines()) if m]
    if not lines:
        cluster.die(f"the probe failed:\n{result.stdout[-2000:]}")
    names = ["block", "dump", "rpc", "restore", "rewrite", "redirect+ready", "disconnect", "total"]
    # Every line is the mean of its own 200 connections; the first ones warm up.
    means = [dict(zip(names, map(float, m.groups()))) for m in lines]
    warm = means[1:] or means
    return {name: statistics.mean(m[name] for m in warm) for name in names}


def middle(values):
    """The median, to a tenth."""
    return round(statistics.median(values), 1)


def run(quick):
    """Rows, one for each kind and system."""
    rounds, count = (1, 200) if quick else (7, 800)
    # Of those whose daemons have a plain channel, as the probe has.
    costly = SYSTEMS[:1] if quick else [system for system in SYSTEMS if not system.peer_tls]
    directory = os.environ.get("XO_PROBE")
    measured = {system: [] for system in SYSTEMS}
    probes, pinned = [], []
    for number in range(rounds):
        order = SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]
        if directory and number % 2 == 0:
            probes.append(probe_round(directory, count))
        for system in order:
            measured[system].append(one_round(system, count, system in costly))
        if directory and number % 2 == 1:
            probes.append(probe_round(directory, count))
        if directory:
            pinned.append(probe_round(directory, count, ["taskset", "-c", str(handoff_cost.SERVER_CPU)]))
        print(f"handoff: round {number + 1} of {rounds}", flush=True)
    rows = []
    for kind in KINDS:
        for system, results in measured.items():
            times = [times[kind] for times, _ in results]
            row = {
                "part": "handoff",
                "kind": kind,
                "mode": system.mode,
                "tls": system.tls,
                "peer_channel": "tls" if system.peer_tls else "plain",
                "polls": system.polls,
                "connections": count * rounds,
                "p50_us": middle(t["p50"] for t in times),
                "p99_us": middle(t["p99"] for t in times),
                "p50_us_rounds": [t["p50"] for t in times],
                "steps": {name: middle(t[name]["p50"] for t in times) for name, _, _ in STEPS},
                "probe_us": middle(p["total"] for p in probes) if probes else None,
                "probe_us_rounds": [round(p["total"], 1) for p in probes],
                "probe_steps": {k: middle(p[k] for p in probes) for k in probes[0]} if probes else None,
            }
            if system in costly:
                row |= handoff_cost.row(kind, [cost for _, cost in results])
                row["probe_per_s_one_core"] = round(1e6 / middle(p["total"] for p in pinned)) if pinned else None
            rows.append(row)
    return rows


def cell(value):
    """A table's cell."""
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def table(rows):
    """The rows beside the probe and the paper, as Markdown."""
    probe = rows[0]["probe_steps"] or {}
    beside = {"block": "block", "dump": "dump", "transfer": "rpc", "restore": "restore", "rewrite": "rewrite", "redirect": "redirect+ready"}
    lines = []
    for kind in KINDS:
        its = [r for r in rows if r["kind"] == kind]
        heads = [System(r["mode"], r["peer_channel"] == "tls", r["tls"], r.get("polls", True)).title() for r in its]
        lines += [
            f"## Hand-off: {kind}, microseconds\n",
            f"p50 of {its[0]['connections']} connections each, medians over rounds; the probe's are means.\n",
            "| step | " + " | ".join(f"XO ({h})" for h in heads) + " | probe | paper |",
            "| --- |" + " ---: |" * (len(its) + 2),
        ]
        for name, text, paper in STEPS:
            cells = [cell(r["steps"][name]) for r in its] + [cell(probe.get(beside.get(name))), cell(paper)]
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
        totals = [f"**{cell(r['p50_us'])}**" for r in its] + [f"**{cell(its[0]['probe_us'])}**", str(PAPER_TOTAL_US)]
        lines.append("| **decision to handler** | " + " | ".join(totals) + " |")
        lines.append("| p99 | " + " | ".join(cell(r["p99_us"]) for r in its) + " | - | - |\n")
    lines.append(
        "Probe and paper hand over in one direction only, outbound. In the early order the next machine hands the socket over before it"
        " answers, so the whole is less than the sum of the steps. HTTPS: the client's connection has TLS 1.3, whose state goes with it.\n"
    )
    return "\n".join(lines) + "\n" + handoff_cost.table(rows)
