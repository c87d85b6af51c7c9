"""Opens connections one after the other and asks for these on each: COUNT http|https HOST PATH...

Prints the nodes that answered, one line a connection.
"""

import socket
import ssl
import sys

BUFFER = 1 << 18


def request(connection, path):
    """Sends a GET; the answering node, when the whole response is there."""
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: bench.test\r\n\r\n".encode())
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(BUFFER)
        if not piece:
            raise EOFError("the connection ended in a head")
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    left = int(fields[b"content-length"]) - len(body)
    while left > 0:
        piece = connection.recv(BUFFER)
        if not piece:
            raise EOFError("the connection ended in a body")
        left -= len(piece)
    return fields[b"x-node"].decode()


def main():
    count, scheme, host, paths = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    # The servers' certificate is made anew for each run.
    context = ssl._create_unverified_context() if scheme == "https" else None
    for _ in range(count):
        with socket.create_connection((host, 443 if context else 80), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with context.wrap_socket(connection) if context else connection as channel:
                print(*[request(channel, path) for path in paths])


if __name__ == "__main__":
    main()
