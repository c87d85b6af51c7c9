"""What a run of the tests left behind.

leaks.py record FILE   notes what there is before the run
leaks.py check FILE    says what there is more of now; exit code 1 if anything
leaks.py sweep FILE    removes it

Beds carry the number of the process that raised them in their names. What belongs to a living one is another run's
and no leak.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"
# The kernel takes namespaces and programs apart some time after their last user has gone.
PATIENCE_S = 10
SWEEP_S = 3


def output(*command):
    """Standard output of a command that must succeed."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def alive(pid):
    """Does this process run? One that nobody has waited for yet does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def abandoned(name):
    """Is the process that is named in this name gone, or none named?"""
    owner = re.search(r"(?:xt|xq|check-)(\d+)", name)
    return owner is None or not alive(owner[1])


def namespaces():
    """Beds' namespaces."""
    names = (line.split()[0] for line in output("ip", "netns", "list").splitlines() if line.strip())
    return {n for n in names if re.match(r"x[tq]\d", n) and abandoned(n)}


def named_networks():
    """Network namespaces that have a name, and our own."""
    files = [pathlib.Path("/proc/self/ns/net"), *pathlib.Path("/run/netns").glob("*")]
    return {f.stat().st_ino for f in files if f.exists()}


def processes():
    """Daemons and servers of this checkout, servers with a bed's files, and whoever is in a bed without a name."""
    found = set()
    networks = named_networks()
    gone = {pathlib.Path("/run/netns", n).stat().st_ino for n in namespaces()}
    for place in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            program = os.readlink(place / "exe")
            libraries = (place / "maps").read_text()
            command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            network = (place / "ns/net").stat().st_ino
            parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # It has just ended, or is a kernel thread.
        ours = program.startswith(f"{BUILD}/xo-peerd") or f"{BUILD}/libxo_preload.so" in libraries
        bed_file = re.search(r"/tmp/xo-\S+", command)
        file_left = bed_file is not None and abandoned(bed_file[0])
        server = pathlib.Path(program).name.split()[0] in ("nginx", "xo-peerd", "haproxy", "lighttpd", "apache2")
        if ours or (file_left and parent == 1) or network in gone or (server and network not in networks):
            found.add(f"{place.name} {command}")
    return found


def programs():
    """XO's BPF programs that no living process holds."""
    found = set()
    for program in json.loads(output("bpftool", "-j", "prog", "show")):
        holders = [holder["pid"] for holder in program.get("pids", [])]
        if program.get("name", "").startswith("xo_") and not any(map(alive, holders)):
            found.add(f"{program['id']} {program['name']}")
    return found


def filters():
    """tc filters and hooks of this machine's own interfaces, and pinned objects."""
    found = {line for line in output("tc", "qdisc", "show").splitlines() if "clsact" in line or "ingress" in line}
    for interface in os.listdir("/sys/class/net"):
        for hook in ("ingress", "egress"):
            shown = subprocess.run(
                ["tc", "filter", "show", "dev", interface, hook], stdout=subprocess.PIPE, text=True, check=False
            ).stdout
            found |= {f"{interface} {hook} {line.strip()}" for line in shown.splitlines()}
    for line in output("bpftool", "net", "show").splitlines():
        if "xo_" in line:
            found.add(line.strip())
    return found | {str(p) for p in pathlib.Path("/sys/fs/bpf").glob("xo*")}


def files():
    """Beds' directories, sockets of daemons."""
    found = [*pathlib.Path("/tmp").glob("xo-*"), *pathlib.Path("/run").glob("xo*")]
    return {str(p) for p in found if abandoned(p.name)}


KINDS = {
    "network namespace": namespaces,
    "process": processes,
    "BPF program": programs,
    "tc filter or pinned object": filters,
    "file": files,
}


def left(before):
    """What there is more of than before, by kind."""
    return {kind: sorted(find() - set(before[kind])) for kind, find in KINDS.items()}


def sweep(before):
    """Removes what is left, again and again for a while: killed processes may still be about to end."""
    end = time.monotonic() + SWEEP_S
    while time.monotonic() < end:
        remove(before)
        time.sleep(0.2)


def remove(before):
    """Removes what is left now."""
    for process in left(before)["process"]:
        try:
            os.kill(int(process.split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            pass
    more = left(before)
    for name in more["network namespace"]:
        subprocess.run(["ip", "netns", "del", name], check=False)
    for name in more["file"]:
        if os.path.isdir(name):
            shutil.rmtree(name, ignore_errors=True)
        else:
            os.unlink(name)


def main():
    """The exit code."""
    command, file = sys.argv[1], pathlib.Path(sys.argv[2])
    if command == "record":
        file.write_text(json.dumps({kind: sorted(find()) for kind, find in KINDS.items()}))
        return 0
    before = json.loads(file.read_text())
    if command == "sweep":
        sweep(before)
        return 0
    end = time.monotonic() + PATIENCE_S
    while any((more := left(before)).values()) and time.monotonic() < end:
        time.sleep(0.2)
    for kind, all_left in more.items():
        for one in all_left:
            print(f"{kind} left: {one}")
    return 1 if any(more.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
