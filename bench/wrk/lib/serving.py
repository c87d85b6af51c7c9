"""The servers that XO is measured beside: plain nginx on the targets, nginx and HAProxy as reverse proxies on the host.

They stand in the same bed as XO, each on ports of its own, so that rounds can alternate without anything being started anew.
"""

import pathlib
import subprocess

import cluster

# Port of the targets' servers that are not under the library.
PLAIN_PORT = 8080
# The same servers, for connections that layer-4 balancing sends there: what they send from this port is rewritten.
L4_TARGET_PORT = 8084
# The same with HTTPS.
TLS_PORT = 8446
# Front ends on the host, plain and TLS.
XO_PORTS = (80, 443)
NGINX_PORTS = (8081, 8443)
NGINX_DEFAULT_PORT = 8085
HAPROXY_PORTS = (8082, 8444)
L4_PORT = 8083
# Spare connections to each target, as many as the clients have at most.
KEEPALIVE = 256
TLS_LINE = "ssl_certificate {0}/web.pem; ssl_certificate_key {0}/web.key; ssl_protocols TLSv1.2 TLSv1.3;"


def write_objects(bed, sizes, prefixes):
    """Objects by name and size, below each of these prefixes."""
    objects = bed.directory / "www" / "objects"
    objects.mkdir()
    longest = cluster.content(max(sizes.values()))
    for name, size in sizes.items():
        (objects / name).write_bytes(longest[:size])
    for prefix in prefixes:
        (bed.directory / "www" / prefix).symlink_to("objects")


def write_policy(bed, rules):
    """The policy: each rule is its lines of TOML."""
    targets = "".join(f'{t} = "{cluster.address(t)}:{cluster.PEER_PORT}"\n' for t in bed.targets)
    text = "".join(f'[[rule]]\n{rule}\nhandler = "web"\n' for rule in rules)
    ports = ", ".join(map(str, XO_PORTS))
    (bed.directory / "policy.toml").write_text(f"listen = [{ports}]\n[targets]\n{targets}{text}")


def write_certificate(bed):
    """The web servers' certificate, which they all share; each run has its own."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=bench.test", "-keyout", bed.directory / "web.key", "-out", bed.directory / "web.pem"]
    subprocess.run(list(map(str, command)), check=True, stderr=subprocess.DEVNULL)
    both = (bed.directory / "web.pem").read_text() + (bed.directory / "web.key").read_text()
    (bed.directory / "both.pem").write_text(both)


def https_of(bed):
    """Lines by which the host's nginx under the library serves HTTPS, too."""
    return f"listen {XO_PORTS[1]} ssl; {TLS_LINE.format(bed.directory)}"


def _nginx(bed, node, name, servers, workers):
    """An nginx that is not under the library."""
    config = bed.directory / f"{name}.conf"
    config.write_text(
        f"user www-data; worker_processes {workers}; daemon off; pid {bed.directory}/{name}.pid;\n"
        f"error_log {bed.directory}/{name}.log warn;\n"
        "events { worker_connections 8192; }\n"
        "http { access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000;\n"
        f"{servers} }}\n"
    )
    return bed.start(node, name, ["nginx", "-e", "stderr", "-c", config])


def plain_targets(bed, workers=1, tls=False):
    """nginx on each target, as under the library, without it; with HTTPS, too, if there is a certificate."""
    https = f"listen {TLS_PORT} ssl; {TLS_LINE.format(bed.directory)}" if tls else ""
    for node in bed.targets:
        server = f"server {{ listen {PLAIN_PORT}; listen {L4_TARGET_PORT}; {https} root {bed.directory}/www; add_header X-Node {node} always; }}"
        _nginx(bed, node, f"{node}-plain", server, workers)
        wait_port(bed, node, PLAIN_PORT, f"{node}-plain")


def nginx_proxy(bed, locations, workers=1, tls=True):
    """nginx as a reverse proxy; `locations`: path prefix to targets, and the line that chooses among them (or none).

    Buffers of more than the default size, and no temporary files: large objects then take it less than half the time. A second
    server on another port has nginx's defaults.
    """
    upstreams, places = "", ""
    for number, (prefix, (nodes, line)) in enumerate(locations.items()):
        servers = " ".join(f"server {cluster.address(n)}:{PLAIN_PORT};" for n in nodes)
        upstreams += f"upstream u{number} {{ {line} {servers} keepalive {KEEPALIVE}; keepalive_requests 1000000; }}\n"
        places += f"location {prefix} {{ proxy_pass http://u{number}; }}\n"
    plain, secure = NGINX_PORTS
    https = f"listen {secure} ssl; {TLS_LINE.format(bed.directory)}" if tls else ""
    keep = f'proxy_http_version 1.1; proxy_set_header Connection "";\n{places}'
    servers = (
        f"server {{ listen {plain}; {https} proxy_buffers 32 16k; proxy_busy_buffers_size 64k; proxy_max_temp_file_size 0; {keep} }}\n"
        f"server {{ listen {NGINX_DEFAULT_PORT}; {keep} }}"
    )
    _nginx(bed, "host", "host-proxy", upstreams + servers, workers)
    wait_port(bed, "host", plain, "host-proxy")


def haproxy(bed, locations, workers=1, tls=True):
    """HAProxy, `http-reuse always`; `locations`: path prefix to targets and lines of the backend (or none).

    It splices plain responses: without that large objects take it several times as long, with other buffers too.
    """
    plain, secure = HAPROXY_PORTS
    uses, backends = "", ""
    for number, (prefix, (nodes, lines)) in enumerate(locations.items()):
        uses += f"  use_backend b{number} if {{ path_beg {prefix} }}\n"
        servers = "".join(f"  server {n} {cluster.address(n)}:{PLAIN_PORT}\n" for n in nodes)
        backends += f"backend b{number}\n  http-reuse always\n{lines}{servers}"
    https = f"  bind :{secure} ssl crt {bed.directory}/both.pem\n" if tls else ""
    config = bed.directory / "haproxy.cfg"
    config.write_text(
        f"global\n  nbthread {workers}\n  maxconn 4096\n  tune.ssl.default-dh-param 2048\n"
        "defaults\n  mode http\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n  option splice-response\n"
        f"frontend web\n  bind :{plain}\n{https}{uses}{backends}"
    )
    bed.start("host", "host-haproxy", ["haproxy", "-db", "-f", config])
    wait_port(bed, "host", plain, "host-haproxy")


def wait_port(bed, node, port, name):
    """Waits until somebody listens on this port of a node."""
    listens = lambda: bed.run(node, ["ss", "-Hltn", f"sport = :{port}"]).strip() != ""
    bed.wait(f"{name} on port {port}", name, bed.named[name], listens)


def tree(program):
    """Process numbers of a program and its children."""
    children = pathlib.Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
    return [program.pid, *map(int, children.split())]


def pids(bed, *names):
    """Process numbers of these programs of the bed, with their workers."""
    return [pid for name in names for pid in tree(bed.named[name])]


def check_bodies(bed, url, paths, size):
    """Fetches these over one connection and compares each body with what it should be."""
    urls = [f"{url}/{path}" for path in paths]
    command = bed.inside("client", ["curl", "-skS", "--fail", "--max-time", "20", *urls])
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    if done.returncode or done.stdout != cluster.content(size) * len(paths):
        cluster.die(f"{url}: {paths} of {size} bytes: {len(done.stdout)} bytes came, or wrong ones (curl: {done.returncode})")
