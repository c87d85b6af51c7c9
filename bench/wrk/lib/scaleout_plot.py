"""Draws throughput over the number of targets, and what the nodes' processes take of a processor."""

import plotting


def name_of(row):
    """A system's name."""
    return f"{row['system']}, every {row['moves_every']}" if row["moves_every"] else row["system"]


def draw(rows, pyplot):
    """Throughput on the left; processor time with the most targets on the right."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.5))
    link = rows[0]["bytes_s"] / 1e6
    names = list(dict.fromkeys(name_of(r) for r in rows[1:]))
    for name in names:
        its = [r for r in rows if name_of(r) == name]
        left.plot([r["targets"] for r in its], [r["bytes_s"] / 1e6 for r in its], marker="o", label=name)
    left.axhline(link, color="grey", linestyle=":", label="one link")
    left.set(xlabel="targets", ylabel="MB/s", xticks=sorted({r["targets"] for r in rows}), ylim=(0, None))
    left.legend(fontsize="x-small")
    most = max(r["targets"] for r in rows)
    last = [r for r in rows if r["targets"] == most]
    nodes = list(last[0]["cpu"])
    for place, row in enumerate(last):
        offsets = [n + place * 0.8 / len(last) for n in range(len(nodes))]
        right.bar(offsets, [row["cpu"][node] for node in nodes], width=0.8 / len(last), label=name_of(row))
    right.set(ylabel="share of a processor", title=f"{most} targets")
    right.set_xticks([n + 0.3 for n in range(len(nodes))], ["front end" if n == "host" else n for n in nodes])
    right.legend(fontsize="x-small")
    return figure


if __name__ == "__main__":
    plotting.main("scaleout", draw)
