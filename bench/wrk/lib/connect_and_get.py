"""Opens connections one after the other and asks for these on each: COUNT HOST PATH...

Prints the nodes that answered, one line a connection.
"""

import socket
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
    count, host, paths = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    for _ in range(count):
        with socket.create_connection((host, 80), timeout=10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            print(*[request(connection, path) for path in paths])


if __name__ == "__main__":
    main()
