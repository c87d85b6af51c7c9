"""What steering costs by itself: the programs, the rules, and packets through a pair of virtual interfaces.

The measurements are ignored tests of xo-peerd, which load the committed object as the daemon does.
"""

import json
import os
import statistics
import subprocess

import cluster

TEST = ["cargo", "test", "--release", "--locked", "-p", "xo-peerd", "--bin", "xo-peerd"]
CHOSEN = ["steer::tests::cost", "--", "--ignored", "--nocapture", "--test-threads=1"]
ROW = "row {"
# Table 2 of the paper, eBPF at tc, microseconds for a rule.
PAPER = {"hold": 4.01, "remove the flow": 3.77}


def measure(quick):
    """One round: value and unit of each figure, by name."""
    how = os.environ | ({"XO_COST": "short"} if quick else {})
    done = subprocess.run([*TEST, *CHOSEN], cwd=cluster.ROOT, env=how, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        cluster.die(f"steering:\n{done.stdout}")
    found = [json.loads(line[line.index(ROW) + 4 :]) for line in done.stdout.splitlines() if ROW in line]
    return {row["what"]: (row["value"], row["unit"]) for row in found}


def run(quick):
    """Rows, one for each figure."""
    rounds = [measure(quick) for _ in range(2 if quick else 9)]
    rows = []
    for what, (_, unit) in rounds[0].items():
        values = [measured[what][0] for measured in rounds]
        low, _, high = statistics.quantiles(values, n=4)
        row = {"part": "steering", "what": what, "unit": unit, "value": round(statistics.median(values), 2)}
        row["middle_half"] = [round(low, 2), round(high, 2)]
        if what in PAPER:
            row["paper"] = PAPER[what]
        rows.append(row | {"rounds": len(rounds)})
    return rows


def table(rows):
    """The rows as Markdown."""
    lines = [
        "## Steering\n",
        f"Medians of {rows[0]['rounds']} rounds, in brackets their middle half. ns: one run of a program (BPF_PROG_TEST_RUN); µs: one"
        " call of the daemon's; packets/s: of one processor that also sends and receives them (veth).\n",
        "| what | | unit | paper |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        digits = 0 if row["unit"] in ("ns", "packets/s") else 2
        low, high = row["middle_half"]
        lines.append(
            f"| {row['what']} | {row['value']:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f}) | {row['unit'].replace('us', 'µs')}"
            f" | {row.get('paper', '-')} |"
        )
    return "\n".join(lines) + "\n"
