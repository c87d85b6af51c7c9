"""Figure 6 of the paper: the connections at one of four targets leave, and others move there.

Long-lived connections are placed by `least_loaded`, with `sticky = "balanced"`. What each target has to do over time is what
its daemon reports; nobody but the policy moves anything.
"""

import json
import subprocess
import time

import cluster

TARGETS = 4
CONNECTIONS = 120
# A request of each connection in so many seconds, on average.
INTERVAL_S = 0.1
SAMPLE_S = 0.1
# Nobody leaves another machine that has less to do by no more than this (the default of `imbalance`).
IMBALANCE = 1.25
LEAVING = "t1"


def write_policy(bed):
    """All targets for everything, by load."""
    targets = "".join(f'{t} = "{cluster.address(t)}:{cluster.PEER_PORT}"\n' for t in bed.targets)
    names = ", ".join(f'"{t}"' for t in bed.targets)
    (bed.directory / "policy.toml").write_text(
        f'listen = [80]\n[targets]\n{targets}[[rule]]\npath_prefix = "/img/"\nto = [{names}]\n'
        'balance = "least_loaded"\nsticky = "balanced"\nhandler = "web"\n'
    )


def sample(bed):
    """What each target says that it serves."""
    return {t["node"]: t["serves"] for t in bed.status("host")["targets"]}


def rests(loads):
    """Has no target more than its share and more than a quarter above the least loaded?"""
    mean, least = sum(loads.values()) / len(loads), min(loads.values()) + 1
    return all(n <= mean + 1 or n <= IMBALANCE * least for n in loads.values())


def watch(bed, client, begun, end):
    """Samples until the client's end: seconds since `begun`, and the loads."""
    samples = []
    while client.poll() is None and time.monotonic() - begun < end:
        samples.append((round(time.monotonic() - begun, 2), sample(bed)))
        time.sleep(SAMPLE_S)
    return samples


def run(quick):
    """One row."""
    leave_at, end = (4, 14) if quick else (10, 30)
    with cluster.Bed(TARGETS, tls=False) as bed:
        write_policy(bed)
        bed.everything()
        moved = lambda: sum(bed.status(node)["onward_total"] for node in bed.nodes)
        program = cluster.ROOT / "bench/wrk/lib/regulars.py"
        command = ["python3", program, CONNECTIONS, cluster.address("host"), "/img/1k", INTERVAL_S, LEAVING, leave_at, end]
        with subprocess.Popen(bed.inside("client", command), stdout=subprocess.PIPE, text=True) as client:
            if client.stdout.readline() != "started\n":
                cluster.die("the connections did not come up")
            begun = time.monotonic()
            samples = watch(bed, client, begun, leave_at - 1)
            moves_before = moved()
            # To the state before the clients end.
            samples += watch(bed, client, begun, end - 1)
            moves = moved() - moves_before
            said = json.loads(client.stdout.read())
        if said["errors"] or client.returncode:
            cluster.die(f"{len(said['errors'])} errors: {said['errors'][:5]}")
        lost = {node: bed.status(node)["failed_total"] for node in bed.nodes}
        if any(lost.values()):
            cluster.die(f"lost: {lost}")
    left = CONNECTIONS - said["left"]
    # From when the report says that all have left who leave.
    after = [(at, loads) for at, loads in samples if at > leave_at and sum(loads.values()) <= left]
    settled = next((at for at, loads in after if rests(loads)), None)
    return [
        {
            "part": "rebalance",
            "targets": TARGETS,
            "connections": CONNECTIONS,
            "leave_at_s": leave_at,
            "left": said["left"],
            "loads_before": next(loads for at, loads in reversed(samples) if at <= leave_at),
            "loads_after": samples[-1][1],
            "balanced_after_s": None if settled is None else round(settled - leave_at, 2),
            "moves": moves,
            "requests": said["requests"],
            "errors": len(said["errors"]),
            "samples": samples,
        }
    ]


def table(rows):
    """The row as Markdown."""
    row = rows[0]
    loads = lambda all_: ", ".join(f"{name} {n}" for name, n in sorted(all_.items()))
    settled = "not within the run" if row["balanced_after_s"] is None else f"{row['balanced_after_s']} s later"
    return (
        "## Rebalance: the connections at one target leave\n\n"
        f"{row['connections']} connections to {row['targets']} targets, `least_loaded` and `sticky = \"balanced\"`; at"
        f" {row['leave_at_s']} s the {row['left']} at {LEAVING} are closed by their clients.\n\n"
        f"- before: {loads(row['loads_before'])}; at the end: {loads(row['loads_after'])}\n"
        f"- no target has more than its share and a quarter above the least loaded any more: {settled}\n"
        f"- moves from target to target since a second before that: {row['moves']}; {row['requests']} requests in all,"
        f" {row['errors']} errors\n\n"
        "![load of each target over time](rebalance.svg)\n"
    )
