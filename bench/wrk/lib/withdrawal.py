"""Figure 4 of the paper: how long a flow rule's withdrawal takes, with XO's queue and with the kernel's backlog.

Short-lived flows come and go at a simulated NIC, serial and as slow as those of the paper's Table 2. The measurement is
xo-flower's example `withdrawal`.
"""

import json
import subprocess

import cluster

# Table 2: what a rule takes to be put in and taken out, microseconds.
NICS = {"ConnectX-5": (476, 404), "ConnectX-7": (2143, 1134), "Agilio": (68, 65)}
# Flows that come in a second, as shares of what the NIC can put in and take out.
SHARES = (0.25, 0.5, 0.75, 0.95, 1.5, 2, 4)
# A flow lives as long as its rule takes, on average: one request.
LENGTH = 64


def measure(nic, mode, share, seconds):
    """One row."""
    both = sum(NICS[nic])
    rate = round(share * 1e6 / both)
    command = [cluster.BUILD / "examples/withdrawal", nic, mode, rate, both, seconds, LENGTH]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    return {"part": "withdrawal", "share": share, "seconds": seconds, "length": LENGTH} | json.loads(done.stdout)


def run(quick):
    """A row for each NIC, way and rate."""
    seconds, nics, shares = (1, list(NICS)[:1], SHARES[1::2]) if quick else (5, list(NICS), SHARES)
    every = [(nic, mode, share) for nic in nics for share in shares for mode in ("backlog", "queue")]
    return [measure(nic, mode, share, seconds) for nic, mode, share in every]


def table(rows):
    """The rows as Markdown."""
    lines = [
        "## Withdrawal: flow rules of short-lived flows\n",
        f"A simulated NIC, {rows[0]['seconds']} s a row; flows live, on average, as long as the NIC takes to put a rule in and out. µs from"
        f" asking until the rule is gone for sure, p50 / p99. Backlog: as in the kernel, each command waits for all before it; queue: XO's,"
        f" {rows[0]['length']} long. Load: flows a second, as a share of what the NIC can put in and take out.\n",
        "| NIC | load | backlog | queue | of the flows: put in | cancelled | no room |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {(row["nic"], row["share"], row["mode"]): row for row in rows}
    for nic, share, mode in found:
        if mode != "queue":
            continue
        queue, backlog = found[nic, share, "queue"], found[nic, share, "backlog"]
        times = lambda row: f"{row['p50_us']:,.0f} / {row['p99_us']:,.0f}"
        part = lambda name: f"{queue[name] / queue['flows']:.0%}"
        lines.append(
            f"| {nic} | {share:.0%} | {times(backlog)} | {times(queue)} | {part('inserted')} | {part('cancelled')} | {part('full')} |"
        )
    return "\n".join(lines) + "\n\n![withdrawal by load](withdrawal.svg)\n"
