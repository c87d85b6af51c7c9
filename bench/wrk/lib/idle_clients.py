"""Connections that ask once and then stay: HOST SOURCE PATH.

Each line of standard input is a number: so many connections more (with "-": these are closed again, one by one). Answers each
with a line of JSON: microseconds from request to response, of each connection.
"""

import json
import socket
import sys
import time

import connect_and_get

IP_BIND_ADDRESS_NO_PORT = 24


def ask(host, source, path):
    """A connection that has been answered, and how long that took, microseconds."""
    connection = socket.socket()
    connection.settimeout(30)
    # A port is chosen when it connects, by what is free towards this address.
    connection.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    connection.bind((source, 0))
    connection.connect((host, 80))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    begun = time.perf_counter()
    connect_and_get.request(connection, path)
    return connection, round((time.perf_counter() - begun) * 1e6, 1)


def main():
    """Until standard input ends; then all connections are closed."""
    host, source, path = sys.argv[1:]
    kept = []
    for line in sys.stdin:
        times = []
        for _ in range(abs(int(line))):
            connection, took = ask(host, source, path)
            times.append(took)
            if line.startswith("-"):
                connection.close()
            else:
                kept.append(connection)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
