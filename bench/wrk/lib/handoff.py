"""Outbound transfers, one connection at a time, in alternating rounds with the naive probe.

Each round raises a fresh bed. XO's time runs from the library's decision in the host's nginx to the target's nginx having
been handed the socket, so it includes two things that the probe does not do: asking the daemon, and handing over.
"""

import os
import re
import statistics
import subprocess

import cluster

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
SYSTEMS = [("early", False), ("strict", False), ("early", True)]
PROBE = re.compile(r"N=\d+ block (\S+) dump (\S+) rpc (\S+) \(T: restore (\S+) rewrite (\S+)\) redirect\+ready (\S+) disconnect (\S+) total (\S+) us")


def one_round(mode, tls, count):
    """Hands `count` connections over; `handoff_us` of the host's status."""
    with cluster.Bed(1, tls=tls) as bed:
        bed.everything(order=mode)
        client = [
            "python3",
            cluster.ROOT / "bench/wrk/lib/connect_and_get.py",
            count,
            cluster.address("host"),
            "/img/1k",
        ]
        nodes = [line.split()[0] for line in bed.run("client", client).splitlines()]
        status = bed.status("host")
        moved = nodes.count("t1")
        if moved != count or status["offloads_total"] != count:
            cluster.die(f"only {moved} of {count} connections moved: {status['refused_by_reason']}")
        return status["handoff_us"]


def probe_round(directory, count):
    """The probe's means, microseconds; its last line has the mean of the last 200."""
    result = subprocess.run(
        ["bash", f"{directory}/run", str(count)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    lines = [m for m in map(PROBE.search, result.stdout.splitlines()) if m]
    if not lines:
        cluster.die(f"the probe failed:\n{result.stdout[-2000:]}")
    names = ["block", "dump", "rpc", "restore", "rewrite", "redirect+ready", "disconnect", "total"]
    # Every line is the mean of its own 200 connections; the first ones warm up.
    means = [dict(zip(names, map(float, m.groups()))) for m in lines]
    warm = means[1:] or means
    return {name: statistics.mean(m[name] for m in warm) for name in names}


def run(quick):
    """Rows, one for each order and kind of peer channel."""
    rounds, count = (3, 400) if quick else (7, 800)
    directory = os.environ.get("XO_PROBE")
    measured = {system: [] for system in SYSTEMS}
    probes = []
    for number in range(rounds):
        order = SYSTEMS if number % 2 == 0 else SYSTEMS[::-1]
        if directory and number % 2 == 0:
            probes.append(probe_round(directory, count))
        for system in order:
            measured[system].append(one_round(*system, count))
        if directory and number % 2 == 1:
            probes.append(probe_round(directory, count))
        print(f"handoff: round {number + 1} of {rounds}", flush=True)
    middle = lambda values: round(statistics.median(values), 1)
    rows = []
    for (mode, tls), results in measured.items():
        rows.append(
            {
                "part": "handoff",
                "kind": "outbound",
                "mode": mode,
                "tls": False,
                "peer_channel": "tls" if tls else "plain",
                "connections": count * rounds,
                "p50_us": middle(r["p50"] for r in results),
                "p99_us": middle(r["p99"] for r in results),
                "p50_us_rounds": [r["p50"] for r in results],
                "steps": {name: middle(r[name]["p50"] for r in results) for name, _, _ in STEPS},
                "probe_us": middle(p["total"] for p in probes) if probes else None,
                "probe_us_rounds": [round(p["total"], 1) for p in probes],
                "probe_steps": {k: middle(p[k] for p in probes) for k in probes[0]} if probes else None,
            }
        )
    return rows


def table(rows):
    """The rows beside the probe and the paper, as Markdown."""
    heads = [f"{r['mode']}, {r['peer_channel']}" for r in rows]
    lines = [
        "## Hand-off: outbound transfer, microseconds\n",
        f"p50 of {rows[0]['connections']} connections each, medians over rounds; the probe's are means.\n",
        "| step | " + " | ".join(f"XO ({h})" for h in heads) + " | probe | paper |",
        "| --- |" + " ---: |" * (len(rows) + 2),
    ]
    probe = rows[0]["probe_steps"] or {}
    beside = {"block": "block", "dump": "dump", "transfer": "rpc", "restore": "restore", "rewrite": "rewrite", "redirect": "redirect+ready"}
    cell = lambda value: "-" if value is None else f"{value:.1f}".removesuffix(".0")
    for name, text, paper in STEPS:
        cells = [cell(r["steps"][name]) for r in rows] + [cell(probe.get(beside.get(name))), cell(paper)]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    totals = [f"**{cell(r['p50_us'])}**" for r in rows] + [f"**{cell(rows[0]['probe_us'])}**", str(PAPER_TOTAL_US)]
    lines.append("| **decision to handler** | " + " | ".join(totals) + " |")
    lines.append("| p99 | " + " | ".join(cell(r["p99_us"]) for r in rows) + " | - | - |")
    lines.append(
        "\nIn the early order the target hands the socket over before it answers, so the whole is less than the sum of the"
        " steps.\n"
    )
    return "\n".join(lines)
