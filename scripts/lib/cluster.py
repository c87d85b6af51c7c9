"""A test bed with XO on it: namespaces, daemons, servers, counters. For scripts/quickstart and bench/wrk/run.

Everything that is started here ends with the `with` block, on failure and on a signal too.
"""

import ctypes
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "release"
PEER_PORT = 7400
PR_SET_PDEATHSIG = 1
STARTUP_S = 20
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Sizes of the objects that every node serves.
SIZES = {"1k": 1 << 10, "10k": 10 << 10, "64k": 64 << 10, "1m": 1 << 20}


def die(message):
    """Ends the program with a message."""
    print(f"{pathlib.Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(1)


def end_on_signals():
    """SIGTERM and SIGHUP unwind the stack, as Ctrl-C does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))


def address(node):
    """IPv4 address of a node."""
    nets = {"client": 1, "host": 2}
    net = nets[node] if node in nets else int(node[1:]) + 2
    return f"10.{net}.0.2"


def content(size):
    """Bytes that differ at every offset that a mistake could shift them to."""
    return b"".join(b"%015d\n" % i for i in range(size // 16 + 1))[:size]


class Bed:
    """Namespaces, and what runs in them."""

    def __init__(self, targets, tls=True, keep=None):
        """`keep`: a directory; the bed then has no prefix, and stays after the `with` block once `kept` is set."""
        self.prefix = f"xq{os.getpid()}-" if keep is None else ""
        self.keep = keep
        self.kept = False
        self.standing = False
        self.nodes = ["host"] + [f"t{i}" for i in range(1, targets + 1)]
        self.targets = self.nodes[1:]
        self.tls = tls
        # Lines of the daemons' [limits].
        self.limits = ""
        self.programs = []
        # The last program of each name.
        self.named = {}
        self.directory = None

    def __enter__(self):
        try:
            if self.keep is None:
                self.directory = pathlib.Path(tempfile.mkdtemp(prefix=f"xo-{self.prefix}"))
            else:
                self.keep.mkdir()
                self.directory = self.keep
            # nginx's workers run as another user.
            self.directory.chmod(0o755)
            self._testbed("up", "--targets", str(len(self.targets)))
            self.standing = True
            self._write_files()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_):
        if self.kept:
            return
        # A second Ctrl-C must not leave half of it behind.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING}
        try:
            for program in reversed(self.programs):
                program.terminate()
            for program in reversed(self.programs):
                try:
                    program.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    program.kill()
                    program.wait()
            for node in self.nodes:
                # What a daemon that was killed has left pinned.
                if self._namespace(node).exists():
                    shutil.rmtree(self._pin_base(node), ignore_errors=True)
            if self.standing:
                self._testbed("down")
        finally:
            if self.directory is not None:
                shutil.rmtree(self.directory, ignore_errors=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _testbed(self, *arguments):
        """A session of its own: Ctrl-C does not reach it. Interrupted while it waits, it still ends what it began."""
        environment = dict(os.environ, XO_BED_PREFIX=self.prefix)
        command = [ROOT / "scripts/testbed", *arguments]
        with subprocess.Popen(command, env=environment, start_new_session=True) as script:
            try:
                status = script.wait()
            except BaseException:
                script.terminate()
                self.standing = script.wait() == 0
                raise
        if status != 0:
            die(f"scripts/testbed {' '.join(arguments)} failed ({status})")

    def _write_files(self):
        www = self.directory / "www"
        (www / "img").mkdir(parents=True)
        (www / "loc").mkdir()
        for name, size in SIZES.items():
            for directory in ("img", "loc"):
                (www / directory / name).write_bytes(content(size))
        targets = "".join(f'{t} = "{address(t)}:{PEER_PORT}"\n' for t in self.targets)
        names = ", ".join(f'"{t}"' for t in self.targets)
        (self.directory / "policy.toml").write_text(
            f"listen = [80]\n[targets]\n{targets}"
            f'[[rule]]\npath_prefix = "/img/"\nto = [{names}]\nhandler = "web"\n'
        )
        if self.tls:
            command = [BUILD / "xo-peerd", "certs", self.directory / "certs", *self.nodes]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def inside(self, node, command):
        """The command line that runs `command` in a node's network."""
        return ["nsenter", f"--net=/run/netns/{self.prefix}{node}", "--", *map(str, command)]

    def run(self, node, command, **options):
        """Runs a command in a node to its end; its standard output."""
        result = subprocess.run(
            self.inside(node, command), stdout=subprocess.PIPE, text=True, check=False, **options
        )
        if result.returncode != 0:
            die(f"{' '.join(map(str, command))} on {node} failed ({result.returncode})")
        return result.stdout

    def start(self, node, name, command, environment=None):
        """Starts a program in a node; its output goes to a log file."""
        libc = ctypes.CDLL(None)

        def in_child():
            if self.keep is None:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

        with (self.directory / f"{name}.log").open("wb") as log:
            program = subprocess.Popen(
                self.inside(node, command),
                env=dict(os.environ, **(environment or {})),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=in_child,
            )
        self.programs.append(program)
        self.named[name] = program
        return program

    def stop(self, program):
        """Ends a program of this bed before the bed ends."""
        self.programs.remove(program)
        program.terminate()
        program.wait()

    def processes(self, node):
        """Daemon and server of a node, with the server's workers."""
        found = []
        for name in (f"{node}-peerd", f"{node}-nginx"):
            if (program := self.named.get(name)) is not None:
                children = pathlib.Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
                found += [program.pid, *map(int, children.split())]
        return found

    def log(self, name):
        """The end of a program's log."""
        text = (self.directory / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-20:])

    def peerd(self, node, order="early"):
        """Starts a daemon and waits until it answers."""
        certs = self.directory / "certs"
        security = (
            f'[tls]\nca = "{certs}/ca.pem"\ncert = "{certs}/{node}.pem"\nkey = "{certs}/{node}.key"\n'
        )
        config = self.directory / f"{node}.toml"
        config.write_text(
            f'node = "{node}"\nlisten = "{address(node)}:{PEER_PORT}"\nsocket = "{self.socket(node)}"\n'
            f'policy = "{self.directory}/policy.toml"\nhandoff = "{order}"\n'
            + ("" if self.tls else "insecure = true\n")
            + (security if self.tls else "")
            + '[[handler]]\nname = "web"\nmode = "attach"\nport = 80\n'
            + (f"[limits]\n{self.limits}\n" if self.limits else "")
        )
        program = self.start(node, f"{node}-peerd", [BUILD / "xo-peerd", "run", "--config", config])
        self.wait(f"xo-peerd on {node}", f"{node}-peerd", program, lambda: self.status(node) is not None)
        return program

    def nginx(self, node, workers=1, preload=True, policy="policy.toml", more="", connections=8192):
        """Starts nginx, under the library unless told otherwise, and waits until it answers.

        `policy` is a file of the bed's directory; with None the library has no policy and does nothing. `more`: lines of
        its configuration's server. `connections`: of each worker, at most.
        """
        config = self.directory / f"{node}-nginx.conf"
        config.write_text(
            f"user www-data; worker_processes {workers}; daemon off; pid {self.directory}/{node}.pid;\n"
            f"error_log {self.directory}/{node}-nginx.log notice;\n"
            f"events {{ worker_connections {connections}; }}\n"
            "http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n"
            f"server {{ listen 80; listen [::]:80; root {self.directory}/www;\n"
            f"add_header X-Node {node} always; {more} }} }}\n"
        )
        environment = {
            "LD_PRELOAD": str(BUILD / "libxo_preload.so"),
            "XO_POLICY": f"{self.directory}/{policy}" if policy else "",
            "XO_SOCKET": str(self.socket(node)),
        }
        name = f"{node}-nginx"
        program = self.start(node, name, ["nginx", "-e", "stderr", "-c", config], environment if preload else {})
        probe = ["curl", "-sf", "-o", "/dev/null", f"http://{address(node)}/loc/1k"]

        def answers():
            return subprocess.run(self.inside("client", probe), check=False).returncode == 0

        self.wait(f"nginx on {node}", name, program, answers)
        return program

    def everything(self, workers=1, order="early", at_host="", more="", connections=8192):
        """Daemons and servers on all nodes; targets are ready to take connections.

        `more`, `connections`: as of `nginx`; `at_host`: the same as `more`, for the host alone.
        """
        for node in self.nodes:
            self.peerd(node, order)
        for node in self.nodes:
            its = more + at_host if node == "host" else more
            self.nginx(node, workers, more=its, connections=connections)
        for node in self.targets:
            # Each worker has an IPv4 and an IPv6 socket.
            ready = lambda: (self.status(node) or {}).get("acceptors", {}).get("web", 0) >= 2 * workers
            self.wait(f"the handler on {node}", f"{node}-peerd", None, ready)
        for node in self.nodes:
            self.wait(f"all targets for {node}", f"{node}-peerd", None, lambda: self._sees_all(node))

    def _sees_all(self, node):
        """Has each of its policy's other machines reported?"""
        targets = (self.status(node) or {}).get("targets")
        return targets is not None and all(t["state"] == "up" for t in targets if t["node"] != node)

    def wait(self, what, name, program, ready):
        """Waits until `ready()`; ends the program when `program`, whose log has this name, has ended, or time is up."""
        end = time.monotonic() + STARTUP_S
        while not ready():
            if program is not None and program.poll() is not None:
                die(f"{what} ended:\n{self.log(name)}")
            if time.monotonic() > end:
                die(f"{what} is not ready:\n{self.log(name)}")
            time.sleep(0.02)

    def _namespace(self, node):
        return pathlib.Path(f"/run/netns/{self.prefix}{node}")

    def _pin_base(self, node):
        """A daemon's pins: the name ends in the namespace's number."""
        return pathlib.Path(f"/sys/fs/bpf/xo/{node}-{self._namespace(node).stat().st_ino}")

    def pins(self, node):
        """Where a node's daemon has pinned programs and maps."""
        found = list(self._pin_base(node).iterdir())
        if len(found) != 1:
            die(f"{node} has pinned {found}")
        return found[0]

    def socket(self, node):
        """The daemon's Unix socket."""
        return self.directory / f"{node}.sock"

    def status(self, node):
        """What `xo-peerd status --json` says, or None when nobody answers."""
        command = [BUILD / "xo-peerd", "status", "--json", "--socket", self.socket(node)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        return json.loads(result.stdout) if result.returncode == 0 else None

    def wait_idle(self):
        """Waits until no connection is offloaded or served by XO."""
        idle = lambda: all((self.status(n) or {}).get("flows_active") == 0 for n in self.nodes)
        self.wait("the last connections", "host-peerd", None, idle)

    def counters(self, node):
        """The kernel's TCP counters and the interface's bytes of a node."""
        files = ["/proc/net/snmp", "/proc/net/netstat"]
        lines = self.run(node, ["cat", *files]).splitlines()
        values = {}
        for names, numbers in zip(lines[::2], lines[1::2]):
            if names.startswith(("Tcp:", "TcpExt:", "IpExt:")):
                values.update(zip(names.split()[1:], map(int, numbers.split()[1:])))
        for line in self.run(node, ["cat", "/proc/net/dev"]).splitlines():
            name, _, rest = line.partition(":")
            if name.strip() == "eth0":
                fields = rest.split()
                values["rx_bytes"], values["tx_bytes"] = int(fields[0]), int(fields[8])
        return values

    def all_counters(self):
        """Counters of all nodes and the client."""
        return {node: self.counters(node) for node in ["client", *self.nodes]}


def cpu_ns(process):
    """Time that a process has spent on a processor."""
    return int(pathlib.Path(f"/proc/{process}/schedstat").read_text().split()[0])


def difference(before, after):
    """Counters since `before`, by node."""
    return {n: {k: v - before[n].get(k, 0) for k, v in c.items()} for n, c in after.items()}


def total(counters, *names):
    """Sum of counters over all nodes."""
    return sum(c.get(name, 0) for c in counters.values() for name in names)


def machine():
    """What the numbers were measured on."""
    model = "unknown"
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {"kernel": os.uname().release, "processor": model, "cpus": os.cpu_count()}
