"""Layer-4 balancing with direct server return: XO's own eBPF programs and tables, whose entries are written beforehand.

No library and no daemon has a hand in these connections: each address and port of a client has an entry already when its first
packet comes. So it is the bound for a connection that stays where XO has moved it. The tables are those of the daemons that stand in
the same bed (layout: xo-bpf/abi).
"""

import ipaddress
import socket
import struct
import subprocess

import cluster
import serving

# The client's ports, for all systems alike: each has an entry.
PORTS = range(40000, 44096)
REDIRECT = 1
# No daemon has a flow of this number.
FLOW_ID = 0xFFFF_FFFF_FFFF


def address(node):
    """An address as in the tables: four words in network byte order."""
    return b"\0" * 10 + b"\xff\xff" + ipaddress.IPv4Address(cluster.address(node)).packed


def port(number):
    """A port as in the tables."""
    return struct.pack("!H", number)


def flow(client_port, target):
    """Key and value of FLOWS: what comes to the host's port goes on to the target's."""
    key = address("client") + address("host") + port(client_port) + port(serving.L4_PORT)
    value = struct.pack("=QQQQII", FLOW_ID, 0, 0, 0, REDIRECT, 0)
    return key, value + address(target) + port(serving.L4_TARGET_PORT) + struct.pack("=HIQ", 0, 0, 0)


def rewrite(client_port, target):
    """Key and value of REWRITES: what the target sends bears the host's address and port."""
    key = address("client") + address(target) + port(client_port) + port(serving.L4_TARGET_PORT)
    value = struct.pack("=QQQQ", FLOW_ID, 0, 0, 0) + address("host") + port(serving.L4_PORT)
    return key, value + struct.pack("=HIQIIII", 0, 0, 0, 0, 0, 0, 0)


def limit_ports(bed):
    """The client connects from these ports only."""
    bed.run("client", ["sysctl", "-qw", f"net.ipv4.ip_local_port_range={PORTS[0]} {PORTS[-1]}", "net.ipv4.tcp_tw_reuse=1"])


def batch(table, entries):
    """Lines for bpftool that write these entries."""
    words = lambda data: " ".join(f"{byte:#04x}" for byte in data)
    return "".join(f"map update pinned {table} key {words(k)} value {words(v)}\n" for k, v in entries)


def _update(text, file):
    file.write_text(text)
    done = subprocess.run(["bpftool", "batch", "file", file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        cluster.die(f"bpftool: {done.stdout[-1000:]}")


class Static:
    """The entries of one target."""

    def __init__(self, bed, target):
        self.file = bed.directory / "l4.batch"
        self.flows = batch(bed.pins("host") / "FLOWS", [flow(p, target) for p in PORTS])
        _update(batch(bed.pins(target) / "REWRITES", [rewrite(p, target) for p in PORTS]), self.file)

    def renew(self):
        """Writes the host's entries, anew before each run: one whose client has closed is forgotten at its next connection."""
        _update(self.flows, self.file)


def check_layout():
    """Sizes of what is written here; those of xo-bpf/abi are asserted there."""
    sizes = [len(part) for pair in (flow(1, "t1"), rewrite(1, "t1")) for part in pair]
    if sizes != [36, 72, 36, 80] or socket.htons(1) == 1:
        cluster.die(f"l4: the tables' layout is another one: {sizes}")
