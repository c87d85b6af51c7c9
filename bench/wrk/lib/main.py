"""bench/wrk/run: runs the parts, writes the numbers."""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import cluster
import handoff
import overhead
import rebalance
import scale
import scaleout
import sharded
import steering
import throughput
import tls
import withdrawal

RESULTS = cluster.ROOT / "bench" / "wrk" / "results"
PARTS = {
    "throughput": throughput,
    "scaleout": scaleout,
    "handoff": handoff,
    "tls": tls,
    "overhead": overhead,
    "steering": steering,
    "rebalance": rebalance,
    "sharded": sharded,
    "scale": scale,
    "withdrawal": withdrawal,
}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/wrk/run", add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "latest.json")
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def load(path):
    """The parts of an earlier run, if there was one: the machine and the rows of each."""
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    parts = {}
    for row in earlier["rows"]:
        machine = earlier.get("machines", {}).get(row["part"], earlier["machine"])
        parts.setdefault(row["part"], (machine, []))[1].append(row)
    return parts


def write(path, machine, parts):
    """All parts as JSON and as Markdown."""
    parts = dict(sorted(parts.items(), key=lambda item: list(PARTS).index(item[0])))
    machines = {name: where for name, (where, _) in parts.items()}
    rows = [row for _, part in parts.values() for row in part]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "machines": machines, "rows": rows}, indent=1) + "\n")
    text = [
        f"Kernel {where['kernel']}, {where['processor']}, {where['cpus']} processors.\n\n{PARTS[name].table(part)}"
        for name, (where, part) in parts.items()
    ]
    path.with_suffix(".md").write_text("\n".join(text))


def plot(part, results):
    """Draws a part, if it has a program that draws; by the system's Python, for it has the package."""
    program = pathlib.Path(__file__).with_name(f"{part}_plot.py")
    if program.exists():
        subprocess.run(["/usr/bin/python3", "-B", program, results, results.with_name(f"{part}.svg")], check=True)


def main():
    """Runs what was asked for."""
    chosen = arguments()
    cluster.end_on_signals()
    names = [name for name in PARTS if getattr(chosen, name)] or list(PARTS)
    machine = cluster.machine()
    # What is not measured now stays as it was.
    parts = load(chosen.out)
    for name in names:
        begun = time.monotonic()
        parts[name] = (machine, PARTS[name].run(chosen.quick))
        print(f"{name}: {time.monotonic() - begun:.0f} s\n\n{PARTS[name].table(parts[name][1])}", flush=True)
        # What is measured is kept, should a later part fail.
        write(chosen.out, machine, parts)
        plot(name, chosen.out)
    print(f"written: {chosen.out} and {chosen.out.with_suffix('.md')}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
