"""The main job of scripts/quickstart: moves connections, checks every body, prints what happened."""

import collections
import hashlib
import pathlib
import random
import shutil
import subprocess
import sys
import time

from cluster import BUILD, ROOT, Bed, address, die, difference, end_on_signals, total

TARGETS = 2
KEPT = pathlib.Path("/run/xo-quickstart")

# curl: so many connections one after the other in each lane, so many objects over each.
LANES = 4
ROUNDS = 6
OBJECTS = 25
LARGEST = 256 << 10
# wrk: the object is one that cluster.py writes.
WRK_CONNECTIONS = 32
WRK_REQUESTS = 20_000
WRK_SECONDS = 5
WRK_OBJECT = "64k"

STEPS = {
    "queue": "server's decision to xo-peerd",
    "block": "hold the flow's packets",
    "dump": "dump the TCP state",
    "transfer": "to the target and back; it may start before",
    "restore": "  of these: restore the TCP state",
    "rewrite": "  and: source rewrite",
    "redirect": "replay what was held, redirect",
    "ready": "hand the socket to nginx",
}


class Outcome:
    """What the clients saw."""

    def __init__(self):
        self.problems = []
        self.requests = collections.Counter()
        self.nodes = collections.Counter()
        self.connections = 0


def write_objects(bed):
    """Objects of different sizes without any repetition; their hashes by name."""
    source = random.Random(1)
    hashes = {}
    for i in range(OBJECTS):
        body = source.randbytes(source.randint(1, LARGEST))
        (bed.directory / "www/img" / str(i)).write_bytes(body)
        hashes[str(i)] = hashlib.sha256(body).hexdigest()
    return hashes


def start_curl(bed, name):
    """Starts a curl that gets one object that stays, then all others, over one connection."""
    place = bed.directory / "fetched" / name
    place.mkdir(parents=True)
    paths = ["/loc/1k"] + [f"/img/{i}" for i in range(OBJECTS)]
    lines = [f'url = "http://{address("host")}{p}"\noutput = "{place / pathlib.Path(p).name}"\n' for p in paths]
    (place / "urls").write_text("".join(lines))
    form = "%{num_connects} %{http_code}\\n"
    # -q: a home directory may hold a configuration file.
    command = ["curl", "-q", "-sS", "--max-time", "30", "-D", place / "heads", "-w", form, "-K", place / "urls"]
    return subprocess.Popen(bed.inside("client", command), stdout=subprocess.PIPE, text=True), place


def finish_curl(process, place, hashes, outcome):
    """Waits for a curl, and compares what it got with the originals."""
    output = process.communicate()[0]
    name = f"curl {place.name}"
    if process.returncode != 0:
        outcome.problems.append(f"{name} ended with {process.returncode}")
    transfers = [line.split() for line in output.splitlines()]
    outcome.requests["curl"] += len(transfers)
    made = sum(int(count) for count, _ in transfers)
    outcome.connections += made
    if made != 1:
        outcome.problems.append(f"{name} opened {made} connections instead of one")
    heads = (place / "heads").read_text() if (place / "heads").exists() else ""
    for line in heads.splitlines():
        if line.lower().startswith("x-node:"):
            outcome.nodes[line.partition(":")[2].strip()] += 1
    for file, wanted in hashes.items():
        body = place / file
        if not body.exists() or hashlib.sha256(body.read_bytes()).hexdigest() != wanted:
            outcome.problems.append(f"{name}: the body of {file} is not the original")
    shutil.rmtree(place)


def run_curl(bed, hashes, outcome):
    """A connection in each lane, and the next ones when these have ended."""
    for turn in range(ROUNDS):
        running = [start_curl(bed, f"{turn}-{lane}") for lane in range(LANES)]
        for process, place in running:
            finish_curl(process, place, hashes, outcome)


def run_wrk(bed, outcome):
    """Many connections at once; the Lua script compares the bodies."""
    url = f"http://{address('host')}/img/{WRK_OBJECT}"
    script = ROOT / "scripts/lib/quickstart.lua"
    original = bed.directory / "www/img" / WRK_OBJECT
    command = ["wrk", "-t1", f"-c{WRK_CONNECTIONS}", f"-d{WRK_SECONDS}s", "--timeout", "60s", "-s", script, url]
    output = bed.run("client", [*command, "--", WRK_REQUESTS, original])
    words = [line.split() for line in output.splitlines()]
    result = {w[1]: int(w[2]) for w in words if w[:1] == ["xo-result"]}
    if not result.get("answered"):
        die(f"wrk got no answer:\n{output}")
    outcome.connections += WRK_CONNECTIONS
    outcome.requests["wrk"] += result["answered"]
    for node in ("host", "t1", "t2"):
        outcome.nodes[node] += result[node]
    for count, what in (
        (result["asked"] - result["answered"], "requests without an answer"),
        (result["wrong"], "bodies that are not the original"),
        (result["unknown"], "answers of an unknown node"),
        (result["broken"], "broken connections"),
    ):
        if count != 0:
            outcome.problems.append(f"wrk: {count} {what}")


def row(name, text):
    """A line of the table."""
    print(f"  {name:<17}{text}")


def size(count):
    """Bytes, readable."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def with_reasons(status, kind):
    """How many, and why."""
    why = ", ".join(f"{reason} {count}" for reason, count in status[f"{kind}_by_reason"].items())
    return f"{kind} {status[f'{kind}_total']}" + (f" ({why})" if why else "")


def report(bed, outcome, whole, wrk):
    """Prints the table; adds to the problems what the counters tell. `whole`, `wrk`: counters over these parts."""
    status = {node: bed.status(node) for node in bed.nodes}
    host = status["host"]
    # Emptying a socket at the host counts as EstabResets there, without a packet.
    resets = total(whole, "OutRsts") + whole["client"]["EstabResets"]
    received = wrk["client"]["rx_bytes"]
    own = wrk["host"]["OutOctets"]
    passed = wrk["host"]["tx_bytes"] - own
    taken = ", ".join(f"{node} {status[node]['accepted_total']}" for node in bed.targets)

    print()
    row("requests", f"{outcome.requests['curl']:,} by curl, {outcome.requests['wrk']:,} by wrk; every body compared")
    row("answered by", "   ".join(f"{node} {outcome.nodes[node]:,}" for node in bed.nodes))
    row("connections", f"{outcome.connections}")
    row("hand-offs", f"{host['offloads_total']} ({taken}), {with_reasons(host, 'refused')}, {with_reasons(host, 'failed')}")
    row("resets", resets)
    row("retransmissions", f"{total(whole, 'RetransSegs')} segments ({total(whole, 'TCPLossProbes')} tail loss probes)")
    print()
    times = host["handoff_us"]
    row("hand-off, µs", f"{'p50':>8} {'p99':>8}")
    for step, what in STEPS.items():
        if step in times:
            row(f"  {step}", f"{times[step]['p50']:>8} {times[step]['p99']:>8}   {what}")
    row("  total", f"{times['p50']:>8} {times['p99']:>8}   of {times['samples']} hand-offs")
    print()
    row("bytes", f"the client received {size(whole['client']['rx_bytes'])}, {size(received)} of it in wrk's part, where")
    for node in bed.targets:
        row("", f"{size(wrk[node]['tx_bytes']):>9} were sent by {node}")
    row("", f"{size(own):>9} were sent by the host's own TCP: handshakes and hand-offs")
    row("", f"{size(passed):>9} of requests and ACKs were passed on to the targets by the host")
    row("", "(counters of each node's interface; the host's own: its IP layer's counter,")
    row("", "which redirected packets do not pass)")
    print()

    if resets:
        each = ", ".join(f"{node} {counters['OutRsts']}" for node, counters in whole.items())
        outcome.problems.append(f"resets sent: {each}; received by the client: {whole['client']['EstabResets']}")
    if host["failed_total"]:
        outcome.problems.append(f"{host['failed_total']} connections were lost")
    if host["offloads_total"] < outcome.connections:
        outcome.problems.append(f"only {host['offloads_total']} of {outcome.connections} connections moved")
    for node in bed.targets:
        if outcome.nodes[node] == 0:
            outcome.problems.append(f"{node} answered nothing")
    if own > received / 20:
        outcome.problems.append(f"the host itself sent {size(own)}, beside {size(received)} that the client received")


def explain(bed):
    """How to use a bed that stays."""
    print(f"""Everything is still up. Try:
  scripts/testbed exec client curl -sv -o /dev/null -o /dev/null \\
      http://{address("host")}/loc/1k http://{address("host")}/img/64k
  {BUILD}/xo-peerd status --socket {bed.socket("host")}
  {BUILD}/xo-peerd flows --socket {bed.socket("t1")}
Policy, configurations and logs are in {bed.directory}. To take it all down: scripts/quickstart --down""")


def take_down():
    """Ends what --keep left."""
    if not KEPT.exists():
        die("nothing was kept")
    subprocess.run([ROOT / "scripts/testbed", "down"], check=True)
    shutil.rmtree(KEPT)


def main():
    """The exit code."""
    keep = "--keep" in sys.argv[1:]
    if "--down" in sys.argv[1:]:
        take_down()
        return 0
    if keep and KEPT.exists():
        die("one is still up: scripts/quickstart --down")
    end_on_signals()
    outcome = Outcome()
    begun = time.monotonic()
    print("raising the network", flush=True)
    with Bed(TARGETS, tls=True, keep=KEPT if keep else None) as bed:
        hashes = write_objects(bed)
        print(f"starting xo-peerd and nginx on {', '.join(bed.nodes)}", flush=True)
        bed.everything()
        start = bed.all_counters()
        print(f"curl: {LANES * ROUNDS} connections, {OBJECTS + 1} objects over each", flush=True)
        run_curl(bed, hashes, outcome)
        middle = bed.all_counters()
        print(f"wrk: {WRK_CONNECTIONS} connections at once, one object over and over", flush=True)
        run_wrk(bed, outcome)
        bed.wait_idle()
        end = bed.all_counters()
        report(bed, outcome, difference(start, end), difference(middle, end))
        bed.kept = keep
        if keep:
            explain(bed)
    for problem in outcome.problems[:20]:
        print(f"FAILED: {problem}")
    if len(outcome.problems) > 20:
        print(f"FAILED: and {len(outcome.problems) - 20} more")
    if not outcome.problems:
        print(f"Every connection moved, and no client noticed ({time.monotonic() - begun:.0f} s).")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
