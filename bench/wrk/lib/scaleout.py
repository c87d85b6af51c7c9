"""Figure 5 of the paper: throughput over the number of targets, where front end and targets have links of the same rate.

A proxy's responses all leave by the front end's link; with XO each target has its own.
"""

import statistics

import cluster
import links
import load
import serving

TARGETS = (1, 2, 4)
NAME, SIZE = "1m", 1 << 20
CONNECTIONS = 32
# System, and how often its connections move: where it listens, what its paths begin with.
SYSTEMS = {
    ("nginx", 0): (serving.NGINX_PORTS[0], "s"),
    ("haproxy", 0): (serving.HAPROXY_PORTS[0], "s"),
    ("xo", 0): (80, "s"),
    ("xo", 1): (80, "e"),
}


def raise_all(bed):
    """Everything that is measured; each path's beginning says how many targets it has, and whether requests of one connection
    are placed one by one."""
    serving.write_objects(bed, {NAME: SIZE}, [f"{kind}{n}" for n in TARGETS for kind in "se"])
    sets = {n: bed.targets[:n] for n in TARGETS}
    names = {n: ", ".join(f'"{t}"' for t in nodes) for n, nodes in sets.items()}
    rules = [f'path_prefix = "/s{n}/"\nto = [{names[n]}]' for n in TARGETS]
    rules += [f'path_prefix = "/e{n}/"\nto = [{names[n]}]\nsticky = false' for n in TARGETS]
    serving.write_policy(bed, rules)
    bed.everything()
    serving.plain_targets(bed)
    places = {f"/s{n}/": (nodes, "") for n, nodes in sets.items()}
    serving.nginx_proxy(bed, places, tls=False)
    serving.haproxy(bed, places, tls=False)
    load.pin(serving.pids(bed, *bed.named))


def node_us(bed):
    """Processor time of each node's processes so far."""
    its = lambda node: [name for name in bed.named if name.startswith(f"{node}-")]
    return {node: sum(map(cluster.cpu_ns, serving.pids(bed, *its(node)))) / 1000 for node in bed.nodes}


def measure(bed, url, path, seconds):
    """One system, so many targets: wrk's figures, each node's share of a processor, bytes it sent."""
    begun, counters = node_us(bed), bed.all_counters()
    result = load.wrk(bed, url, "load.lua", [0, path], CONNECTIONS, seconds)
    spent, sent = node_us(bed), cluster.difference(counters, bed.all_counters())
    if result["requests"] == 0:
        cluster.die(f"{url}{path}: no request was answered")
    return {
        "req_s": result["requests"] * 1e6 / result["us"],
        "bytes_s": result["bytes"] * 1e6 / result["us"],
        "errors": result["errors"],
        "retransmits": cluster.total(sent, "RetransSegs"),
        "requests": result["requests"],
        "cpu": {node: (us - begun[node]) / result["us"] for node, us in spent.items()},
        "sent": {node: sent[node]["tx_bytes"] for node in bed.nodes},
    }


def row(key, results, link):
    """Medians of a system's rounds; `link`: bytes per second of one target's link."""
    (system, moves_every), targets = key
    middle = lambda name: statistics.median(r[name] for r in results)
    return {
        "part": "scaleout",
        "system": system,
        "moves_every": moves_every,
        "targets": targets,
        "object_bytes": SIZE,
        "connections": CONNECTIONS,
        "link_bit_s": links.RATE_BIT_S,
        "req_s": round(middle("req_s"), 1),
        "bytes_s": round(middle("bytes_s")),
        "of_one_link": round(middle("bytes_s") / link, 2),
        "errors": sum(r["errors"] for r in results),
        "retransmits": sum(r["retransmits"] for r in results),
        "requests": sum(r["requests"] for r in results),
        "cpu": {node: round(statistics.median(r["cpu"][node] for r in results), 3) for node in results[0]["cpu"]},
        "rounds": len(results),
    }


def run(quick):
    """A row for each system and number of targets; the first is direct service by one target, which says what a link carries."""
    rounds, seconds = (1, 1) if quick else (3, 3)
    keys = [(system, n) for n in TARGETS for system in SYSTEMS if n > 1 or system[1] == 0]
    direct = (("direct", 0), 1)
    measured = {key: [] for key in [direct, *keys]}
    with cluster.Bed(max(TARGETS), tls=False) as bed:
        raise_all(bed)
        links.shape(bed, True)
        for number in range(rounds):
            measured[direct].append(measure(bed, f"http://{cluster.address('t1')}:{serving.PLAIN_PORT}", f"/s1/{NAME}", seconds))
            for (system, n) in keys if number % 2 == 0 else keys[::-1]:
                port, kind = SYSTEMS[system]
                url = f"http://{cluster.address('host')}:{port}"
                if number == 0:
                    serving.check_bodies(bed, url, [f"{kind}{n}/{NAME}"], SIZE)
                measured[system, n].append(measure(bed, url, f"/{kind}{n}/{NAME}", seconds))
            print(f"scaleout: round {number + 1} of {rounds}", flush=True)
    link = statistics.median(r["bytes_s"] for r in measured[direct])
    return [row(key, results, link) for key, results in measured.items()]


def title(row):
    """A system's name."""
    return f"{row['system']}, moves every {row['moves_every']}" if row["moves_every"] else row["system"]


def table(rows):
    """The rows as Markdown."""
    first = rows[0]
    lines = [
        f"## Scale-out: links of {first['link_bit_s'] / 1e9:g} Gbit/s\n",
        f"{first['object_bytes'] >> 20} MB objects over {first['connections']} connections; medians of {first['rounds']} alternating rounds."
        " The links of the host and of each target are shaped both ways, the client's is not. In the last columns the"
        " processes of each node, as shares of a processor (what the kernel does with packets for others is not in it).\n",
        "| system | targets | MB/s | of one link | resent per response | errors | host | " + " | ".join(f"t{n + 1}" for n in range(max(TARGETS))) + " |",
        "| --- |" + " ---: |" * (6 + max(TARGETS)),
    ]
    for r in rows:
        cells = [title(r), str(r["targets"]), f"{r['bytes_s'] / 1e6:,.0f}", f"{r['of_one_link']:.2f}"]
        cells += [f"{r['retransmits'] / r['requests']:.2f}", str(r["errors"]), *(f"{cpu:.3f}" for cpu in r["cpu"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n![throughput over targets, and processor time](scaleout.svg)\n"
