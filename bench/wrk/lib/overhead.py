"""What the library costs a server whose connections stay: nginx and wrk on a processor each.

In each round every system is measured once, in one bed, and compared with plain nginx of the same round.
"""

import os
import pathlib
import re
import statistics

import cluster

SIZE = "1k"
CONNECTIONS = 32
SERVER_CPU, CLIENT_CPU = 0, 1
# System, what it is, its policy's rules (None: no policy), whether it runs under the library.
SYSTEMS = {
    "plain": ("nginx alone", None),
    "inert": ("library, no policy", None),
    "no-match": ("library and daemon, no rule matches", '[[rule]]\npath_prefix = "/never/"\nto = ["t1"]\n'),
    "local": (
        "library and daemon, a `local` rule matches",
        '[[rule]]\npath_prefix = "/loc/"\nto = ["local"]\n[[rule]]\npath_prefix = "/never/"\nto = ["t1"]\n',
    ),
}
DONE = re.compile(r"(\d+) requests in")
RATE = re.compile(r"Requests/sec:\s+(\S+)")
BAD = re.compile(r"Socket errors:|Non-2xx")


def write_policies(bed):
    """Writes each system's policy file."""
    head = f'listen = [80]\n[targets]\nt1 = "{cluster.address("t1")}:{cluster.PEER_PORT}"\n'
    for name, (_, rules) in SYSTEMS.items():
        if rules is not None:
            (bed.directory / f"{name}.toml").write_text(head + rules)


def measure(bed, system, seconds):
    """One system's requests per second, and the worker's processor time for a request, microseconds."""
    followed = SYSTEMS[system][1] is not None
    daemon = bed.peerd("host") if followed else None
    server = bed.nginx("host", preload=system != "plain", policy=f"{system}.toml" if followed else None)
    (worker,) = pathlib.Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
    os.sched_setaffinity(int(worker), {SERVER_CPU})
    load = ["taskset", "-c", CLIENT_CPU, "wrk", "-t1", f"-c{CONNECTIONS}"]
    url = f"http://{cluster.address('host')}/loc/{SIZE}"
    bed.run("client", [*load, "-d1s", url])
    before = cluster.cpu_ns(worker)
    output = bed.run("client", [*load, f"-d{seconds}s", url])
    used_us = (cluster.cpu_ns(worker) - before) / 1000
    done = DONE.search(output)
    if BAD.search(output) or not done:
        cluster.die(f"{system}:\n{output}")
    requests = int(done[1])
    if followed and bed.status("host")["library"]["local"] < requests:
        cluster.die(f"{system}: the library has not followed the connections")
    bed.stop(server)
    if daemon:
        bed.stop(daemon)
    return {"req_s": float(RATE.search(output)[1]), "cpu_us": used_us / requests}


def spread(values):
    """The middle half of some numbers: its ends."""
    low, _, high = statistics.quantiles(values, n=4)
    return [round(low, 3), round(high, 3)]


def run(quick):
    """Rows, one for each system."""
    if os.cpu_count() < 2:
        cluster.die("server and client need a processor each")
    rounds, seconds = (2, 1) if quick else (15, 3)
    measured = {system: [] for system in SYSTEMS}
    with cluster.Bed(1, tls=False) as bed:
        write_policies(bed)
        for number in range(rounds):
            names = list(SYSTEMS)
            # Each begins in its turn, so that none is always the one after a pause.
            turn = number % len(names)
            for system in names[turn:] + names[:turn]:
                measured[system].append(measure(bed, system, seconds))
            print(f"overhead: round {number + 1} of {rounds}", flush=True)
    rows = []
    for system, results in measured.items():
        beside = list(zip(results, measured["plain"]))
        ratios = [one["req_s"] / plain["req_s"] for one, plain in beside]
        cpu_ratios = [one["cpu_us"] / plain["cpu_us"] for one, plain in beside]
        rows.append(
            {
                "part": "overhead",
                "system": system,
                "object_bytes": cluster.SIZES[SIZE],
                "connections": CONNECTIONS,
                "tls": False,
                "req_s": round(statistics.median(r["req_s"] for r in results)),
                "ratio_to_plain": round(statistics.median(ratios), 3),
                "ratio_to_plain_middle_half": spread(ratios),
                "cpu_us_per_req": round(statistics.median(r["cpu_us"] for r in results), 2),
                "cpu_ratio_to_plain": round(statistics.median(cpu_ratios), 3),
                "cpu_ratio_to_plain_middle_half": spread(cpu_ratios),
                "rounds": rounds,
            }
        )
    return rows


def table(rows):
    """The rows as Markdown."""
    lines = [
        f"## Overhead: nginx, {rows[0]['object_bytes']} bytes, {rows[0]['connections']} keep-alive connections\n",
        f"Medians of {rows[0]['rounds']} alternating rounds; ratios are to plain nginx of the same round, in brackets their"
        " middle half.\n",
        "| system | requests/s | of plain | worker's CPU µs/request | of plain |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ratio = lambda row, name: f"{row[name]:.3f} ({' to '.join(f'{end:.3f}' for end in row[name + '_middle_half'])})"
    for row in rows:
        cells = [
            SYSTEMS[row["system"]][0],
            str(row["req_s"]),
            ratio(row, "ratio_to_plain"),
            f"{row['cpu_us_per_req']:.2f}",
            ratio(row, "cpu_ratio_to_plain"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
