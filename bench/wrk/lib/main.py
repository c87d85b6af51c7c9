"""bench/wrk/run: runs the parts, writes the numbers."""

import argparse
import json
import pathlib
import sys
import time

import cluster
import handoff

RESULTS = cluster.ROOT / "bench" / "wrk" / "results"
PARTS = {"handoff": handoff}


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench/wrk/run", add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "latest.json")
    for name in PARTS:
        parser.add_argument(f"--{name}", action="store_true")
    return parser.parse_args()


def main():
    """Runs what was asked for."""
    chosen = arguments()
    cluster.end_on_signals()
    names = [name for name in PARTS if getattr(chosen, name)] or list(PARTS)
    machine = cluster.machine()
    rows, text = [], [f"Kernel {machine['kernel']}, {machine['processor']}, {machine['cpus']} processors.\n"]
    for name in names:
        begun = time.monotonic()
        part = PARTS[name].run(chosen.quick)
        rows += part
        text.append(PARTS[name].table(part))
        print(f"{name}: {time.monotonic() - begun:.0f} s\n\n{text[-1]}", flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    chosen.out.with_suffix(".md").write_text("\n".join(text))
    print(f"written: {chosen.out} and {chosen.out.with_suffix('.md')}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
