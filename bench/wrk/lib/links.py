"""Links of the same rate for the host and each target; the client's stays as fast as the machine."""

import cluster

RATE_BIT_S = 1_000_000_000
# Room for the segments that the kernel sends as one (64 KiB), and for a few windows.
BURST, LIMIT = 131072, 4 << 20


def _net(node):
    return cluster.address(node).split(".")[1]


def shape(bed, on):
    """Shapes both directions of each node's link, or takes that away."""
    for node in bed.nodes:
        for where, device in ((node, "eth0"), ("router", f"r{_net(node)}")):
            if on:
                tbf = ["tbf", "rate", RATE_BIT_S, "burst", BURST, "limit", LIMIT]
                bed.run(where, ["tc", "qdisc", "replace", "dev", device, "root", *tbf])
            else:
                bed.run(where, ["tc", "qdisc", "del", "dev", device, "root"])
