"""Requests per second and what they cost, over object sizes: XO beside direct service, layer-4 balancing, nginx and HAProxy.

All systems stand in one bed at the same time (those with TLS in a second one); each size has its rounds, in which each system is
measured once, beginning with another one each time. One worker everywhere, all servers and daemons on one processor, wrk on the other, which has a thread for each connection: so its
script knows how often each has asked.
"""

import math
import statistics

import cluster
import l4
import load
import serving

SIZES = {"1k": 1 << 10, "10k": 10 << 10, "100k": 100 << 10, "1m": 1 << 20, "10m": 10 << 20}
QUICK_SIZES = ("1k", "1m")
# Of l4's requests/s: what a connection that stays should reach.
GOAL = 0.97
CONNECTIONS = 31
RULES = ['path_prefix = "/t1/"\nto = ["t1"]', 'path_prefix = "/t2/"\nto = ["t2"]']
XO = ("host-peerd", "host-nginx")
# System, how often its connections move (requests), TLS; to whom the client speaks; the front end's programs, and whether its eBPF
# program is a part of it.
SYSTEMS = {
    ("direct", 0, False): ("t1", serving.PLAIN_PORT, (), False),
    ("l4", 0, False): ("host", serving.L4_PORT, (), True),
    ("nginx", 0, False): ("host", serving.NGINX_PORTS[0], ("host-proxy",), False),
    ("nginx-default", 0, False): ("host", serving.NGINX_DEFAULT_PORT, ("host-proxy",), False),
    ("haproxy", 0, False): ("host", serving.HAPROXY_PORTS[0], ("host-haproxy",), False),
    ("xo", 0, False): ("host", 80, XO, True),
    ("xo", 1, False): ("host", 80, XO, True),
    ("xo", 20, False): ("host", 80, XO, True),
    ("xo", 40, False): ("host", 80, XO, True),
    ("direct", 0, True): ("t1", serving.TLS_PORT, (), False),
    ("nginx", 0, True): ("host", serving.NGINX_PORTS[1], ("host-proxy",), False),
    ("haproxy", 0, True): ("host", serving.HAPROXY_PORTS[1], ("host-haproxy",), False),
    ("xo-tls", 0, True): ("host", 443, XO, True),
    ("xo-tls", 1, True): ("host", 443, XO, True),
    ("xo-tls", 20, True): ("host", 443, XO, True),
}
MEDIANS = {
    "req_s": 1,
    "bytes_s": 0,
    "p50_us": 0,
    "p99_us": 0,
    "p999_us": 0,
    "frontend_cpu_us_per_req": 3,
    "total_cpu_us_per_req": 2,
    "frontend_nic_bytes_per_req": 0,
    "moves_per_req": 3,
}
SUMS = ("requests", "errors", "resets", "retransmits")


def raise_all(bed):
    """Everything that is measured; all of it on one processor."""
    serving.write_objects(bed, SIZES, ["t1", "t2"])
    serving.write_policy(bed, RULES)
    serving.write_certificate(bed)
    l4.check_layout()
    l4.limit_ports(bed)
    bed.everything(at_host=serving.https_of(bed))
    serving.plain_targets(bed, tls=True)
    places = {f"/{node}/": ((node,), "") for node in bed.targets}
    serving.nginx_proxy(bed, places)
    serving.haproxy(bed, places)
    load.pin(serving.pids(bed, *bed.named))


def url_of(bed, system):
    """Where a system is, and the paths without the object's name."""
    (_, moves_every, tls), (node, port, _, _) = system, SYSTEMS[system]
    url = f"{'https' if tls else 'http'}://{cluster.address(node)}:{port}"
    return url, ["t1/", "t2/"] if moves_every else ["t1/"]


def measure(bed, system, name, seconds, static, program):
    """One system with one object."""
    url, prefixes = url_of(bed, system)
    _, _, front, steered = SYSTEMS[system]
    if system[0] == "l4":
        static.renew()
    paths = [f"/{p}{name}" for p in prefixes]
    run = lambda before_end: load.wrk(bed, url, "load.lua", [system[1], *paths], CONNECTIONS, seconds, before_end)
    pids = serving.pids(bed, *front)
    return load.metered(bed, pids, program if steered else None, 0 if system[2] else SIZES[name], run)


def row(system, size, results):
    """Medians, and sums of what should not happen."""
    middle = lambda name, digits: round(statistics.median(r[name] for r in results), digits or None)
    head = {"part": "throughput", "system": system[0], "moves_every": system[1], "object_bytes": size, "tls": system[2]}
    head |= {"connections": CONNECTIONS, "rounds": len(results)}
    head |= {name: middle(name, digits) for name, digits in MEDIANS.items()}
    head |= {name: load.sum_or_none(r[name] for r in results) for name in SUMS}
    return head | {"req_s_rounds": [round(r["req_s"], 1) for r in results]}


def break_even(rows, beside):
    """The object size at which moving with every request is as fast as this proxy, bytes; None: not within the sizes measured.

    Between two sizes the ratio is taken to be a power of the size.
    """
    plain = [r for r in rows if not r["tls"]]
    rate = lambda *system: {r["object_bytes"]: r["req_s"] for r in plain if (r["system"], r["moves_every"]) == system}
    xo, proxy = rate("xo", 1), rate(beside, 0)
    ratios = [(size, math.log(xo[size] / proxy[size])) for size in sorted(xo)]
    if ratios[0][1] >= 0:
        return ratios[0][0]
    for (size, ratio), (next_size, next_ratio) in zip(ratios, ratios[1:]):
        if ratio < 0 <= next_ratio:
            part = -ratio / (next_ratio - ratio)
            return round(size * (next_size / size) ** part)
    return None


def rounds_of(bed, systems, names, rounds, seconds):
    """All measurements of these systems, by system and object."""
    static, program = l4.Static(bed, "t1"), load.ingress_program(bed, "host")
    static.renew()
    for system in systems:
        url, prefixes = url_of(bed, system)
        for name in names:
            serving.check_bodies(bed, url, [f"{p}{name}" for p in prefixes], SIZES[name])
    measured = {(system, name): [] for name in names for system in systems}
    for name in names:
        for number in range(rounds):
            turn = number * len(systems) // rounds
            for system in systems[turn:] + systems[:turn]:
                measured[system, name].append(measure(bed, system, name, seconds, static, program))
        print(f"throughput: {name} done", flush=True)
    return measured


def run(quick):
    """A row for each system and size, and one for each break-even size."""
    names, rounds, seconds = (QUICK_SIZES, 1, 1) if quick else (SIZES, 3, 2)
    measured = {}
    for tls in (False, True):
        systems = [system for system in SYSTEMS if system[2] == tls]
        # Secrets of TLS connections need an encrypted channel between the daemons.
        with cluster.Bed(2, tls=tls) as bed, load.program_times():
            raise_all(bed)
            measured |= rounds_of(bed, systems, names, rounds, seconds)
    rows = [row(system, SIZES[name], results) for (system, name), results in measured.items()]
    even = {"part": "throughput", "system": "xo", "moves_every": 1, "tls": False}
    return rows + [even | {"beside": proxy, "break_even_bytes": break_even(rows, proxy)} for proxy in ("nginx", "haproxy")]


def title(row):
    """A system's name."""
    name = row["system"]
    if name.startswith("xo"):
        name += f", moves every {row['moves_every']}" if row["moves_every"] else ", stays"
    return name + (" (TLS)" if row["tls"] and not name.startswith("xo") else "")


def size_text(size):
    """1024: 1 KB."""
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size / 1024:.3g} KB"


def one_table(rows, size):
    """All systems with one size; ratios are to nginx as a proxy."""
    its = [r for r in rows if r.get("object_bytes") == size]
    proxy = {r["tls"]: r["req_s"] for r in its if r["system"] == "nginx"}
    lines = [
        f"### {size_text(size)}\n",
        "| system | requests/s | of nginx's | MB/s | p50 µs | p99 µs | p99.9 µs | errors | resets | resent per response | front end µs"
        " | all µs | front end bytes | moves per request |",
        "| --- |" + " ---: |" * 13,
    ]
    for r in its:
        cells = [title(r), f"{r['req_s']:,.0f}", f"{r['req_s'] / proxy[r['tls']]:.2f}", f"{r['bytes_s'] / 1e6:,.0f}"]
        cells += [f"{r[p]:,.0f}" for p in ("p50_us", "p99_us", "p999_us")] + [str(r["errors"]), "-" if r["resets"] is None else str(r["resets"])]
        cells += [f"{r['retransmits'] / r['requests']:.3f}", f"{r['frontend_cpu_us_per_req']:.2f}", f"{r['total_cpu_us_per_req']:.1f}"]
        cells += [f"{r['frontend_nic_bytes_per_req']:,.0f}", f"{r['moves_per_req']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def findings(rows):
    """Where XO is slower than it should be, and what is known about why (profiles: docs/ARCHITECTURE.md, "Where the time goes")."""
    measured = [r for r in rows if "object_bytes" in r and not r["tls"]]
    rate = {(r["system"], r["moves_every"], r["object_bytes"]): r for r in measured}
    sizes = sorted({r["object_bytes"] for r in measured})
    found = lambda values: ", ".join(f"{size_text(size)} {value:.2f}" for size, value in values) or "none"
    to_l4 = [(size, rate["xo", 0, size]["req_s"] / rate["l4", 0, size]["req_s"]) for size in sizes]
    resent = lambda system, every, size: rate[system, every, size]["retransmits"] / rate[system, every, size]["requests"]
    more = [
        f"{size_text(size)} every {every}: {resent('xo', every, size):.2f} (l4: {resent('l4', 0, size):.2f})"
        for size in sizes
        for every in (1, 20, 40)
        if resent("xo", every, size) > resent("l4", 0, size) + 0.005
    ]
    small = sizes[0]
    moved = [
        f"{rate['xo', every, small]['req_s'] / rate['nginx', 0, small]['req_s']:.2f} moving every {every} ({artifact})"
        for every, artifact in ((1, 0.4), (20, 1.7), (40, 1.9))
    ]
    return [
        "### Slower than it should be\n",
        f"- XO, stays, beside l4, where below {GOAL}: {found(v for v in to_l4 if v[1] < GOAL)}. The library looks at each request's head before the server"
        " takes it: one more receive, heads parsed twice. It cannot be taken first, for what a socket has given cannot be put back.",
        f"- {size_text(small)}, of nginx's requests/s, in brackets what the paper's artifact reaches with a server of its own in the process that hands over:"
        f" {', '.join(moved)}. A move is about a hundred system calls of the daemons, five messages, and as many wake-ups; no function of XO's has more than two"
        " percent of it.",
        f"- More segments resent for a response than l4: {'; '.join(more) or 'none'}. They are lost, not overtaken (few come twice, and"
        " `net.ipv4.tcp_reordering` changes nothing): a connection that has moved is in slow start again, for its threshold cannot go along.\n",
    ]


def table(rows):
    """The rows as Markdown."""
    first = rows[0]
    text = (
        "## Throughput\n\n"
        f"wrk with {first['connections']} connections on one processor, all servers and daemons on the other; medians of {first['rounds']} alternating"
        " rounds (errors, resets, and resent segments over all). Front end: processor time of the host's processes for XO or the"
        " proxy, and of its eBPF program; all: of the whole machine, client included; bytes: through the front end's"
        " interface, both ways, each for a request.\n\n"
    )
    text += "\n".join(one_table(rows, size) for size in sorted({r["object_bytes"] for r in rows if "object_bytes" in r}))
    for r in rows:
        if "break_even_bytes" in r:
            at = r["break_even_bytes"]
            at = "beyond what was measured" if at is None else f"at {size_text(at)} (or below)"
            text += f"\nMoving with every request is as fast as {r['beside']} {at}.\n"
    text += "\n" + "\n".join(findings(rows))
    return text + "\n![requests per second over object size](throughput.svg)\n"
