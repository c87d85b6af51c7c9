"""What TLS costs when a connection moves, and afterwards: XO's record layer beside OpenSSL's.

Keys and records by themselves are measured by an ignored test of xo-proto and by `openssl speed`; then nginx with OpenSSL and nginx
under the library, to which connections have moved, serve the same object, both on one processor.
"""

import json
import re
import statistics
import subprocess

import cluster
import load
import serving

TEST = ["cargo", "test", "--release", "--locked", "-p", "xo-proto", "--lib", "tls::cost", "--", "--ignored", "--nocapture"]
ROW = "row {"
# The paper's kernel TLS, section 5 (microseconds).
PAPER = {"export": 3, "import": 20}
SUITES = {"AES-128-GCM": "aes-128-gcm", "AES-256-GCM": "aes-256-gcm", "CHACHA20-POLY1305": "chacha20-poly1305"}
# Bytes of a record.
RECORD = 1 << 14
SPEED = re.compile(r"(\d+(?:\.\d+)?)k\s*$")
SIZES = {"10k": 10 << 10, "1m": 1 << 20}
RULES = ['path_prefix = "/t1"\nto = ["t1"]']
# System: to whom the client speaks, the server's program, and where it has its objects. nginx never sends files by itself under
# OpenSSL; where it has plain connections it does, unless told otherwise.
SYSTEMS = {
    "openssl": ("t1", serving.TLS_PORT, "t1-plain", "t1"),
    "xo": ("host", 443, "t1-nginx", "t1"),
    "xo, sendfile off": ("host", 443, "t1-nginx", "t1-read"),
}
READ = "location /t1-read/ { sendfile off; }"
CONNECTIONS = 31


def costs():
    """One run of the test: value by what and suite, microseconds."""
    done = subprocess.run(TEST, cwd=cluster.ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        cluster.die(f"tls:\n{done.stdout}")
    found = [json.loads(line[line.index(ROW) + 4 :]) for line in done.stdout.splitlines() if ROW in line]
    return {(row["what"], row["suite"]): row["value"] for row in found}


def openssl_speed(suite):
    """A megabyte in records by OpenSSL's cipher alone, microseconds."""
    command = ["openssl", "speed", "-seconds", "1", "-bytes", str(RECORD), "-evp", SUITES[suite]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return (1 << 20) / float(SPEED.search(done.stdout)[1]) * 1000


def served(bed, system, name, seconds):
    """One system with one object: see load.metered; the front end is the server that has the connections."""
    node, port, program, directory = SYSTEMS[system]
    url = f"https://{cluster.address(node)}:{port}"
    run = lambda before_end: load.wrk(bed, url, "load.lua", [0, f"/{directory}/{name}"], CONNECTIONS, seconds, before_end)
    # wrk counts TLS records' bytes as they come.
    return load.metered(bed, serving.pids(bed, program), None, 0, run)


def serve(rounds, seconds):
    """All rounds of both systems, by system and object."""
    with cluster.Bed(1) as bed:
        serving.write_objects(bed, SIZES, ["t1", "t1-read"])
        serving.write_policy(bed, RULES)
        serving.write_certificate(bed)
        bed.everything(at_host=serving.https_of(bed), more=READ)
        serving.plain_targets(bed, tls=True)
        load.pin(serving.pids(bed, *bed.named))
        for node, port, _, directory in SYSTEMS.values():
            for name, size in SIZES.items():
                serving.check_bodies(bed, f"https://{cluster.address(node)}:{port}", [f"{directory}/{name}"], size)
        measured = {(system, name): [] for name in SIZES for system in SYSTEMS}
        for number in range(rounds):
            for name in SIZES:
                for system in list(SYSTEMS)[:: 1 if number % 2 == 0 else -1]:
                    measured[system, name].append(served(bed, system, name, seconds))
    return measured


def run(quick):
    """Rows: one for each cost and suite, and one for each system and object."""
    rounds, seconds = (1, 1) if quick else (5, 2)
    runs = [costs() | {("openssl speed 1 MB", s): openssl_speed(s) for s in SUITES} for _ in range(rounds)]
    rows = []
    for what, suite in runs[0]:
        value = round(statistics.median(measured[what, suite] for measured in runs), 3)
        row = {"part": "tls", "what": what, "suite": suite, "unit": "us", "value": value, "rounds": rounds}
        rows.append(row | ({"paper": PAPER[what]} if what in PAPER else {}))
    for (system, name), results in serve(rounds, seconds).items():
        middle = lambda key, digits: round(statistics.median(r[key] for r in results), digits or None)
        row = {"part": "tls", "system": system, "object_bytes": SIZES[name], "tls": True, "rounds": rounds}
        row |= {"req_s": middle("req_s", 1), "bytes_s": middle("bytes_s", 0), "p50_us": middle("p50_us", 0)}
        row |= {"server_cpu_us_per_req": middle("frontend_cpu_us_per_req", 2)}
        row |= {key: load.sum_or_none(r[key] for r in results) for key in ("errors", "resets")}
        rows.append(row)
    return rows


def table(rows):
    """The rows as Markdown."""
    alone = {(r["what"], r["suite"]): r["value"] for r in rows if "what" in r}
    paper = {r["what"]: r["paper"] for r in rows if "paper" in r}
    lines = [
        "## TLS: the state that goes along, and records afterwards\n",
        f"Microseconds, medians of {rows[0]['rounds']} runs. Export and import: both directions' keys and sequence numbers, by the library; encode and decode:"
        " the message between library and daemon. `openssl speed`: OpenSSL's cipher alone on blocks of a record's size. The paper's figures are for"
        " keys in the kernel.\n",
        "| what | " + " | ".join(SUITES) + " | paper |",
        "| --- |" + " ---: |" * (len(SUITES) + 1),
    ]
    for what in dict.fromkeys(what for what, _ in alone):
        digits = 0 if "1 MB" in what else 2
        cells = [f"{alone[what, suite]:.{digits}f}" for suite in SUITES]
        lines.append(f"| {what} | " + " | ".join(cells) + f" | {paper.get(what, '-')} |")
    lines += [
        "\nTLS 1.3 with the servers' own choice of suite, 31 connections, server and daemons on one processor: nginx with OpenSSL, asked directly, and"
        " nginx under the library, to which the connections have moved: it sends files by sendfile(2) with `tcp_nopush`, as Debian configures it, and"
        " once with `sendfile off`.\n",
        "| object | records by | requests/s | MB/s | p50 µs | server's CPU, µs/request | errors | resets |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in (r for r in rows if "system" in r):
        size = f"{r['object_bytes'] >> 20} MB" if r["object_bytes"] >= 1 << 20 else f"{r['object_bytes'] >> 10} KB"
        by = r["system"].replace("openssl", "OpenSSL").replace("xo", "XO")
        resets = "-" if r["resets"] is None else r["resets"]
        cells = [f"{r['req_s']:,.0f}", f"{r['bytes_s'] / 1e6:,.0f}", f"{r['p50_us']:,}", f"{r['server_cpu_us_per_req']:,.1f}", r["errors"], resets]
        lines.append(f"| {size} | {by} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"
