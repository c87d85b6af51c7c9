"""What the programs that draw share: RESULTS_JSON SVG. Debian's python3-matplotlib is needed."""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
# The same figures make the same file.
matplotlib.rcParams["svg.hashsalt"] = "xo"
from matplotlib import pyplot  # noqa: E402 (the backend comes first)


def main(part, draw):
    """`draw(rows of the part, pyplot)` gives the figure."""
    rows = [r for r in json.loads(pathlib.Path(sys.argv[1]).read_text())["rows"] if r["part"] == part]
    figure = draw(rows, pyplot)
    figure.tight_layout()
    figure.savefig(sys.argv[2], metadata={"Date": None})
