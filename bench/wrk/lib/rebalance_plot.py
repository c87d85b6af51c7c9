"""Draws the load of each target over time: RESULTS_JSON SVG. Debian's python3-matplotlib is needed."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
# The same figures make the same file.
matplotlib.rcParams["svg.hashsalt"] = "xo"
from matplotlib import pyplot  # noqa: E402 (the backend comes first)


def main():
    """One line a target."""
    rows = json.loads(pathlib.Path(sys.argv[1]).read_text())["rows"]
    row = next(r for r in rows if r["part"] == "rebalance")
    figure, axes = pyplot.subplots(figsize=(7, 3))
    times = [at for at, _ in row["samples"]]
    for target in sorted(row["loads_after"]):
        axes.plot(times, [loads.get(target, 0) for _, loads in row["samples"]], label=target)
    axes.axvline(row["leave_at_s"], color="grey", linestyle=":")
    axes.set(xlabel="time, s", ylabel="connections served", ylim=(0, None))
    axes.legend(ncol=len(row["loads_after"]), loc="lower right")
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
