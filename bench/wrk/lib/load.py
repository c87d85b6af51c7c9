"""One run of wrk, and what it took: requests, latency, retransmissions, resets, bytes, processor time."""

import contextlib
import json
import os
import pathlib
import subprocess
import time

import cluster

# All servers and daemons share the one processor; the client has the other.
SERVER_CPU, CLIENT_CPU = 0, 1
HERE = pathlib.Path(__file__).parent
TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")
# A response's head is no longer.
HEAD = 512
STATS = pathlib.Path("/proc/sys/kernel/bpf_stats_enabled")


def pin(pids):
    """Gives the servers' processor to these processes and all of their threads."""
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {SERVER_CPU})


def sum_or_none(numbers):
    """Their sum; None if one of them is not known."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def busy_us():
    """Time that this machine's processors have spent on anything so far."""
    user, nice, system, _, _, irq, softirq = map(int, pathlib.Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) * TICK_US


@contextlib.contextmanager
def program_times():
    """The kernel counts the run time of eBPF programs meanwhile."""
    before = STATS.read_text()
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text(before)


def bpftool(*arguments):
    """What bpftool says, as JSON."""
    command = ["bpftool", "--json", *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def ingress_program(bed, node):
    """Number of the program on a node's interface that looks at what comes in."""
    link = bpftool("link", "show", "pinned", bed.pins(node) / "link-eth0-ingress")
    return link["prog_id"] if isinstance(link, dict) else link[0]["prog_id"]


def program_us(number):
    """Run time of an eBPF program so far."""
    program = bpftool("prog", "show", "id", number)
    return program.get("run_time_ns", 0) / 1000


def script(bed, name):
    """A script of this directory with what they share, as one file."""
    both = bed.directory / name
    both.write_text((HERE / name).read_text() + (HERE / "done.lua").read_text())
    return both


def wrk(bed, url, name, arguments, connections=31, seconds=1, before_end=None):
    """Runs wrk, a thread for each connection, on the client's processor, with this script; what it says.

    `before_end` is called before wrk closes its connections in the midst of responses; the result's `before_end` is what it
    says, or None when wrk has ended meanwhile, as on a busy machine.
    """
    command = ["taskset", "-c", CLIENT_CPU, "wrk", f"-t{connections}", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s"]
    command = bed.inside("client", [*command, "-s", script(bed, name), url, "--", *arguments])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        seen = None
        if before_end:
            time.sleep(seconds * 0.7)
            seen = before_end()
            seen = seen if client.poll() is None else None
        output = client.stdout.read()
    if client.returncode:
        cluster.die(f"wrk at {url} failed ({client.returncode}):\n{output}")
    return json.loads(output.splitlines()[-1]) | {"before_end": seen}


def moves(bed):
    """Hand-offs of all daemons so far."""
    names = ("offloads_total", "onward_total", "sent_home_total")
    return sum(bed.status(node)[name] for node in bed.nodes for name in names)


def front_us(front, program):
    """Processor time of the front end's processes, and of its eBPF program."""
    processes = sum(map(cluster.cpu_ns, front)) / 1000
    return processes + (0 if program is None else program_us(program))


def metered(bed, front, program, size, run):
    """`run(before_end)` (see `wrk`) and what it took, for each request. `front`: processes of the front end; `program`: its eBPF program, or none."""
    moved, counters = moves(bed), bed.all_counters()
    sent_resets = lambda: sum(bed.counters(node)["OutRsts"] - counters[node]["OutRsts"] for node in bed.nodes)
    front_before, busy = front_us(front, program), busy_us()
    result = run(sent_resets)
    front_used, busy_used = front_us(front, program) - front_before, busy_us() - busy
    used = cluster.difference(counters, bed.all_counters())
    requests = result["requests"]
    if requests == 0:
        cluster.die(f"no request was answered: {result}")
    # wrk takes no response for one that is shorter or longer than it says; this is about what it says.
    least, most = requests * size, (requests + 1024) * (size + HEAD)
    if size and not least <= result["bytes"] <= most:
        cluster.die(f"{requests} responses of {size} bytes: {result['bytes']} bytes came")
    return {
        "requests": requests,
        "req_s": requests * 1e6 / result["us"],
        "bytes_s": result["bytes"] * 1e6 / result["us"],
        **{name: result[name] for name in ("p50_us", "p99_us", "p999_us", "errors")},
        "resets": result["before_end"],
        "retransmits": cluster.total(used, "RetransSegs"),
        "frontend_cpu_us_per_req": front_used / requests,
        "total_cpu_us_per_req": busy_used / requests,
        "frontend_nic_bytes_per_req": (used["host"]["rx_bytes"] + used["host"]["tx_bytes"]) / requests,
        "moves_per_req": (moves(bed) - moved) / requests,
    }
