"""Draws the latency of withdrawals by load: RESULTS_JSON SVG. Debian's python3-matplotlib is needed."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
# The same figures make the same file.
matplotlib.rcParams["svg.hashsalt"] = "xo"
from matplotlib import pyplot  # noqa: E402 (the backend comes first)


def main():
    """A panel for each NIC, p50 and p99 of both ways."""
    rows = json.loads(pathlib.Path(sys.argv[1]).read_text())["rows"]
    rows = [row for row in rows if row["part"] == "withdrawal"]
    nics = list(dict.fromkeys(row["nic"] for row in rows))
    figure, all_axes = pyplot.subplots(1, len(nics), figsize=(3 * len(nics) + 1, 3), sharey=True, squeeze=False)
    for axes, nic in zip(all_axes[0], nics):
        for mode, colour in (("backlog", "tab:red"), ("queue", "tab:blue")):
            its = [row for row in rows if row["nic"] == nic and row["mode"] == mode]
            for value, style in (("p50_us", "-"), ("p99_us", ":")):
                loads, values = [row["share"] for row in its], [row[value] for row in its]
                axes.plot(loads, values, style, color=colour, marker=".", label=f"{mode}, {value[:3]}")
        axes.axvline(1, color="grey", linewidth=0.5)
        axes.set(title=nic, xlabel="load, share of the NIC's", xscale="log", yscale="log")
    all_axes[0][0].set_ylabel("withdrawal, µs")
    all_axes[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
