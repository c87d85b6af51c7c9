"""What hand-offs cost: processor time on either side, and how many of them one processor carries."""

import os
import re
import statistics
import time

import cluster

# All daemons and servers of a bed share the one processor; the client has the other.
SERVER_CPU, CLIENT_CPU = 0, 1
# Odd, so that each connection's requests alternate.
CONNECTIONS = 7
SECONDS = 2
COUNTERS = ["offloads_total", "onward_total", "sent_home_total"]
# Kind: what the clients ask for in turn, and whether each request has a connection of its own.
LOADS = {"outbound": (["/t1/"], True), "t2t": (["/t1/", "/t2/"], False), "inbound": (["/t1/", "/home/"], False)}
BAD = re.compile(r"Socket errors:|Non-2xx")


def spent(bed):
    """Processor time of each node's daemon and server so far, microseconds."""
    return {node: sum(map(cluster.cpu_ns, bed.processes(node))) / 1000 for node in bed.nodes}


def by_node(bed, count, ask, prefixes):
    """Processor time of each node for a connection that asks for these, microseconds."""
    before = spent(bed)
    ask(bed, count, prefixes)
    return {node: (us - before[node]) / count for node, us in spent(bed).items()}


def measure(bed, count, ask):
    """Costs by kind of one bed."""
    home, twice = by_node(bed, count, ask, ["/home/"]), by_node(bed, count, ask, ["/home/", "/home/"])
    out, on = by_node(bed, count, ask, ["/t1/"]), by_node(bed, count, ask, ["/t1/", "/t2/"])
    back = by_node(bed, count, ask, ["/t1/", "/home/"])
    # A request that is served where the connection is; whoever gets the connection serves one, which is no cost of the move.
    request = twice["host"] - home["host"]
    sides = {
        "outbound": (out["host"] - home["host"] + request, out["t1"] - request, 0),
        "t2t": (on["t1"] - out["t1"], on["t2"] - request, on["host"] - out["host"]),
        "inbound": (back["t1"] - out["t1"], back["host"] - out["host"] - request, 0),
    }
    everything = {pid for node in bed.nodes for pid in bed.processes(node)}
    for pid in everything:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {SERVER_CPU})
    rates = {kind: under_load(bed, kind) for kind in LOADS}
    return {"request_us": request, "sides": sides, "rates": rates}


def under_load(bed, kind):
    """Hand-offs per second, and processor time of all daemons and servers for each, requests included."""
    prefixes, anew = LOADS[kind]
    paths = ", ".join(f'"{prefix}1k"' for prefix in prefixes)
    headers = '{ ["Connection"] = "close" }' if anew else "nil"
    script = bed.directory / f"{kind}.lua"
    script.write_text(
        f"local paths, i = {{ {paths} }}, 0\nfunction request()\n  i = i % #paths + 1\n"
        f'  return wrk.format("GET", paths[i], {headers})\nend\n'
    )
    load = ["taskset", "-c", CLIENT_CPU, "wrk", "-t1", f"-c{CONNECTIONS}", "-s", script]
    url = f"http://{cluster.address('host')}"
    bed.run("client", [*load, "-d1s", url])
    moved = lambda: sum(bed.status(node)[counter] for node in bed.nodes for counter in COUNTERS)
    moved_before, cpu_before, begun = moved(), spent(bed), time.monotonic()
    output = bed.run("client", [*load, f"-d{SECONDS}s", url])
    took, moves = time.monotonic() - begun, moved() - moved_before
    if BAD.search(output) or moves == 0:
        cluster.die(f"{kind}, {moves} moved:\n{output}")
    used = sum(us - cpu_before[node] for node, us in spent(bed).items())
    return {"per_s": moves / took, "cpu_us": used / moves}


def row(kind, costs):
    """The part of a row that is about this kind; `costs` has one for each round."""
    middle = lambda values: round(statistics.median(values), 1)
    sides = zip(*(cost["sides"][kind] for cost in costs))
    return {
        "cpu_us": dict(zip(["sender", "receiver", "home"], map(middle, sides))),
        "request_cpu_us": middle(cost["request_us"] for cost in costs),
        "per_s_one_core": round(middle(cost["rates"][kind]["per_s"] for cost in costs)),
        "cpu_us_under_load": middle(cost["rates"][kind]["cpu_us"] for cost in costs),
    }


def table(rows):
    """The costs, as Markdown."""
    its = [r for r in rows if "cpu_us" in r]
    lines = [
        "## Hand-off: what it costs\n",
        "Processor time of daemon and server on either side, microseconds, one connection at a time, the request itself not"
        f" included ({its[0]['request_cpu_us']:.1f}); where the daemons poll, that is (up to `limits.spin_us` after each step). Beside it hand-offs per second"
        " with all daemons and servers on one processor and the client (wrk) on the other, and all processor time for each,"
        " requests and, for outbound ones, new connections included. `inbound` alternates with outbound ones there. The probe's rate"
        " is that of its bare chain of steps on one processor.\n",
        "| kind | order | polling | sender | receiver | home | per second, one core | CPU each | probe, per second |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in its:
        cells = [r["kind"], r["mode"], "yes" if r.get("polls", True) else "no", *(f"{r['cpu_us'][side]:.1f}" for side in ("sender", "receiver", "home"))]
        cells += [str(r["per_s_one_core"]), f"{r['cpu_us_under_load']:.1f}", str(r["probe_per_s_one_core"] or "-")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
