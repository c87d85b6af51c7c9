"""Draws the load of each target over time."""

import plotting


def draw(rows, pyplot):
    """One line a target."""
    row = rows[0]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    times = [at for at, _ in row["samples"]]
    for target in sorted(row["loads_after"]):
        axes.plot(times, [loads.get(target, 0) for _, loads in row["samples"]], label=target)
    axes.axvline(row["leave_at_s"], color="grey", linestyle=":")
    axes.set(xlabel="time, s", ylabel="connections served", ylim=(0, None))
    axes.legend(ncol=len(row["loads_after"]), loc="lower right")
    return figure


if __name__ == "__main__":
    plotting.main("rebalance", draw)
