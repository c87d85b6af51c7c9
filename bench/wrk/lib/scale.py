"""What many moved connections cost: memory of each, and the time of a hand-off beside them.

The connections have asked once, were moved to one of four targets, and stay there idle. No process may need more than 20,000 open
files, so clients and servers are several.
"""

import contextlib
import json
import pathlib
import statistics
import subprocess
import time

import cluster
import load
import serving

TARGETS, CLIENTS = 4, 4
LEVELS, QUICK_LEVELS = (1000, 10_000, 50_000), (1000, 5000)
SAMPLES = 400
# Longer than the daemons' look at all of their connections is apart.
IDLE_S = 12
# Beyond this a worker would take no more: a quarter of the most, and room.
WORKER_CONNECTIONS = 16_384


def rss(pids):
    """Resident memory of processes, bytes."""
    lines = [line for pid in pids for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmRSS:"))


def slab():
    """The kernel's objects: sockets of both ends, buffers, table entries; bytes."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Slab:"))


def table_bytes(bed, node, name):
    """Memory of one of a daemon's tables."""
    shown = load.bpftool("map", "show", "pinned", bed.pins(node) / name)
    return (shown if isinstance(shown, dict) else shown[0])["bytes_memlock"]


def memory(bed):
    """Where memory is, bytes."""
    of = lambda *names: rss(serving.pids(bed, *names))
    return {
        "host_daemon": of("host-peerd"),
        "host_server": of("host-nginx"),
        "host_table": table_bytes(bed, "host", "FLOWS"),
        "target_daemons": of(*(f"{t}-peerd" for t in bed.targets)),
        "target_servers": of(*(f"{t}-nginx" for t in bed.targets)),
        "target_tables": sum(table_bytes(bed, t, "REWRITES") for t in bed.targets),
        "kernel_slab": slab(),
    }


class Clients:
    """Processes that hold connections open."""

    def __init__(self, bed, stack):
        program = cluster.ROOT / "bench/wrk/lib/idle_clients.py"
        self.programs = []
        # Each has an address of its own (the bed gives three): one has not enough ports for all.
        bed.run("client", ["ip", "addr", "add", "10.1.0.5/24", "dev", "eth0"])
        for number in range(CLIENTS):
            source = f"10.1.0.{2 + number}"
            command = bed.inside("client", ["python3", program, cluster.address("host"), source, "/all/1k"])
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            client = stack.enter_context(subprocess.Popen(command, **pipes))
            stack.callback(client.terminate)
            self.programs.append(client)

    def ask(self, numbers):
        """Each opens so many; the times of all."""
        for client, number in zip(self.programs, numbers):
            client.stdin.write(f"{number}\n")
            client.stdin.flush()
        answers = [client.stdout.readline() for client, _ in zip(self.programs, numbers)]
        if not all(answers):
            cluster.die("a client has ended")
        return [one for answer in answers for one in json.loads(answer)]


def serves(bed):
    """Connections that were moved and are not over."""
    return bed.status("host")["flows_active"]


def daemons_us(bed):
    """Processor time of the daemons of the host and of one target so far, microseconds."""
    return {node: cluster.cpu_ns(bed.named[f"{node}-peerd"].pid) / 1000 for node in ("host", "t1")}


def level(bed, clients, wanted, have, empty, idle_s):
    """Opens what is missing to `wanted` connections; the row."""
    begun = time.monotonic()
    clients.ask([(wanted - have) // CLIENTS] * CLIENTS)
    filled_s = time.monotonic() - begun
    if serves(bed) != wanted:
        refused = bed.status("host")["refused_by_reason"]
        cluster.die(f"{serves(bed)} of {wanted} connections are at the targets: {refused}")
    now = memory(bed)
    per_connection = {name: round((now[name] - empty[name]) / wanted) for name in now}
    idle_cpu = None
    if idle_s:
        used = daemons_us(bed)
        time.sleep(idle_s)
        idle_cpu = {node: round((us - used[node]) / idle_s / 1e6, 5) for node, us in daemons_us(bed).items()}
    times = clients.ask([-SAMPLES])
    return {
        "part": "scale",
        "connections": wanted,
        "bytes_per_connection": per_connection,
        "handoffs_s_filling": round((wanted - have) / filled_s),
        "moved_request_p50_us": round(statistics.median(times), 1),
        "moved_request_p99_us": round(statistics.quantiles(times, n=100)[98], 1),
        "samples": SAMPLES,
        "idle_daemon_cpu": idle_cpu,
        "daemon_threads": len(list(pathlib.Path(f"/proc/{bed.named['host-peerd'].pid}/task").iterdir())),
    }


def run(quick):
    """A row for each number of connections."""
    levels, idle_s = (QUICK_LEVELS, 0) if quick else (LEVELS, IDLE_S)
    rows, have = [], 0
    with cluster.Bed(TARGETS, tls=False) as bed, contextlib.ExitStack() as stack:
        serving.write_objects(bed, {"1k": 1024}, ["all"])
        names = ", ".join(f'"{t}"' for t in bed.targets)
        serving.write_policy(bed, [f'path_prefix = "/all/"\nto = [{names}]'])
        bed.everything(more="keepalive_timeout 1h;", connections=WORKER_CONNECTIONS)
        clients = Clients(bed, stack)
        clients.ask([-20] * CLIENTS)
        bed.wait_idle()
        empty = memory(bed)
        for wanted in levels:
            rows.append(level(bed, clients, wanted, have, empty, idle_s))
            bed.wait(f"no more than {wanted} connections", "host-peerd", None, lambda: serves(bed) == wanted)
            have = wanted
            print(f"scale: {wanted} done", flush=True)
    return rows


def table(rows):
    """The rows as Markdown."""
    names = list(rows[0]["bytes_per_connection"])
    lines = [
        "## Scale: moved connections that stay idle\n",
        f"Connections that were moved to one of {TARGETS} targets by their first request. Memory in bytes for each, over that of the bed without"
        " them: resident memory of daemons and servers, the daemons' tables, and all of the kernel's objects (slab), in which are the"
        " sockets of both ends and the tables. Then hand-offs per second while they were opened by four clients at the same time, a"
        f" request with its hand-off beside them ({rows[0]['samples']} new connections, one after the other, request to response), and"
        " what the daemons of the host and of one target take of a processor when nothing happens. One thread of a daemon does all hand-offs.\n",
        "| connections | " + " | ".join(n.replace("_", " ") for n in names) + " | hand-offs/s | moved request p50 µs | p99 µs | idle host | idle t1 |",
        "| ---: |" + " ---: |" * (len(names) + 5),
    ]
    for r in rows:
        cells = [f"{r['connections']:,}", *(f"{r['bytes_per_connection'][n]:,}" for n in names), f"{r['handoffs_s_filling']:,}"]
        cells += [f"{r['moved_request_p50_us']:,.0f}", f"{r['moved_request_p99_us']:,.0f}"]
        idle = r["idle_daemon_cpu"] or {}
        cells += [f"{100 * idle[node]:.2f} %" if node in idle else "-" for node in ("host", "t1")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
