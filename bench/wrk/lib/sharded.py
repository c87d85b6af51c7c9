"""The shape of the paper's Figure 7: each object belongs to one of four targets, and clients ask for objects by popularity.

All systems place objects by a hash of the path, each by its own. Measured with links of the same rate for the host and each target, where the
front end's is a proxy's limit, and without, where processors are.
"""

import random
import statistics

import cluster
import links
import load
import serving

TARGETS = 4
OBJECTS, EXPONENT = 128, 1.1
LEAST, MOST = 64 << 10, 4 << 20
CONNECTIONS = 32
SEED = 1
SYSTEMS = {"xo": 80, "nginx": serving.NGINX_PORTS[0], "haproxy": serving.HAPROXY_PORTS[0]}


def sizes():
    """Sizes of the objects, by number: evenly spread on a logarithmic scale, in no order; always the same."""
    spread = [round(LEAST * (MOST / LEAST) ** (n / (OBJECTS - 1))) for n in range(OBJECTS)]
    random.Random(SEED).shuffle(spread)
    return {str(number): size for number, size in enumerate(spread)}


def raise_all(bed, objects):
    """Everything that is measured."""
    serving.write_objects(bed, objects, ["obj"])
    names = ", ".join(f'"{t}"' for t in bed.targets)
    serving.write_policy(bed, [f'path_prefix = "/obj/"\nto = [{names}]\nbalance = "hash"\nkey = "path"'])
    bed.everything()
    serving.plain_targets(bed)
    serving.nginx_proxy(bed, {"/obj/": (bed.targets, "hash $uri consistent;")}, tls=False)
    serving.haproxy(bed, {"/obj/": (bed.targets, "  balance uri\n  hash-type consistent\n")}, tls=False)
    load.pin(serving.pids(bed, *bed.named))


def measure(bed, system, seed, seconds):
    """One system; what wrk says, and the front end's share."""
    url = f"http://{cluster.address('host')}:{SYSTEMS[system]}"
    front = serving.pids(bed, *{"xo": ("host-peerd", "host-nginx"), "nginx": ("host-proxy",), "haproxy": ("host-haproxy",)}[system])
    run = lambda before_end: load.wrk(bed, url, "sharded.lua", [seed, "/obj/", OBJECTS, EXPONENT], CONNECTIONS, seconds, before_end)
    before = bed.all_counters()
    result = load.metered(bed, front, load.ingress_program(bed, "host") if system == "xo" else None, 0, run)
    sent = cluster.difference(before, bed.all_counters())
    by_target = {t: sent[t]["tx_bytes"] for t in bed.targets}
    return result | {"share": {t: n / sum(by_target.values()) for t, n in by_target.items()}}


def row(system, shaped, results):
    """Medians of a system's rounds."""
    middle = lambda name, digits: round(statistics.median(r[name] for r in results), digits or None)
    head = {"part": "sharded", "system": system, "targets": TARGETS, "objects": OBJECTS, "zipf": EXPONENT, "tls": False}
    head |= {"least_bytes": LEAST, "most_bytes": MOST, "link_bit_s": links.RATE_BIT_S if shaped else None}
    digits = {"req_s": 1, "bytes_s": 0, "p50_us": 0, "p99_us": 0, "frontend_cpu_us_per_req": 1, "total_cpu_us_per_req": 1}
    head |= {name: middle(name, n) for name, n in (digits | {"frontend_nic_bytes_per_req": 0, "moves_per_req": 3}).items()}
    head |= {name: load.sum_or_none(r[name] for r in results) for name in ("requests", "errors", "resets", "retransmits")}
    share = {t: round(statistics.median(r["share"][t] for r in results), 3) for t in results[0]["share"]}
    return head | {"share": share, "connections": CONNECTIONS, "rounds": len(results)}


def run(quick):
    """A row for each system, with shaped links and without."""
    rounds, seconds = (1, 1) if quick else (3, 4)
    objects = sizes()
    measured = {(system, shaped): [] for shaped in (True, False) for system in SYSTEMS}
    with cluster.Bed(TARGETS, tls=False) as bed, load.program_times():
        raise_all(bed, objects)
        for port in SYSTEMS.values():
            for number in ("0", "1", "2"):
                serving.check_bodies(bed, f"http://{cluster.address('host')}:{port}", [f"obj/{number}"], objects[number])
        for number in range(rounds):
            for shaped in (True, False):
                links.shape(bed, shaped)
                for system in list(SYSTEMS) if number % 2 == 0 else list(SYSTEMS)[::-1]:
                    measured[system, shaped].append(measure(bed, system, number, seconds))
            print(f"sharded: round {number + 1} of {rounds}", flush=True)
    return [row(*key, results) for key, results in measured.items()]


def table(rows):
    """The rows as Markdown."""
    first = rows[0]
    lines = [
        "## Sharded objects\n",
        f"{first['objects']} objects of {first['least_bytes'] >> 10} KB to {first['most_bytes'] >> 20} MB on {first['targets']} targets by a hash of the path,"
        f" asked for by {first['connections']} connections, Zipf {first['zipf']}; medians of {first['rounds']} alternating rounds. The busiest target"
        " sends the share shown of all bytes: with links of a rate, one over that share is the most that all together can do.\n",
        "| links | system | requests/s | MB/s | p50 ms | p99 ms | moves per request | front end µs/request | all µs | busiest target | errors | resets |",
        "| --- | --- |" + " ---: |" * 10,
    ]
    for r in rows:
        link = f"{r['link_bit_s'] / 1e9:g} Gbit/s" if r["link_bit_s"] else "as they are"
        cells = [link, r["system"], f"{r['req_s']:,.0f}", f"{r['bytes_s'] / 1e6:,.0f}", f"{r['p50_us'] / 1000:.1f}", f"{r['p99_us'] / 1000:.1f}"]
        cells += [f"{r['moves_per_req']:.2f}", f"{r['frontend_cpu_us_per_req']:.1f}", f"{r['total_cpu_us_per_req']:.0f}"]
        cells += [f"{max(r['share'].values()):.2f}", str(r["errors"]), "-" if r["resets"] is None else str(r["resets"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
