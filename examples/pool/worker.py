#!/usr/bin/env python3
"""A worker for a handler of mode "pool" (docs/HANDLERS.md), with nothing but the standard library.

Takes connections from xo-peerd and serves HTTP/1.1 on each of them in a thread of its own, with as many requests as the client likes.

worker.py [SOCKET]: with SOCKET it connects there, and again when the daemon has been away; without, it uses the channel that the
daemon has started it with. GET /.../bytes/N is answered with N bytes, any other path with a line of text.
"""

import http.server
import json
import os
import socket
import sys
import threading
import time

VERSION = 1
# Connections at once.
CAPACITY = 64
MAX_MESSAGE = 4096
# How often a daemon that is away is looked for, seconds.
AGAIN = 0.2


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A connection on which nothing is asked for so long is closed, seconds.
    timeout = 60

    def do_GET(self):
        _, found, number = self.path.rpartition("/bytes/")
        if found and number.isdigit():
            body = b"x" * min(int(number), 1 << 30)
        else:
            body = f"{self.path} for {self.client_address[0]}\n".encode()
        self.send_response(200)
        self.send_header("X-Node", "python")
        self.send_header("X-Worker", str(os.getpid()))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Worker:
    def __init__(self):
        self.lock = threading.Lock()
        self.channel = None
        # Which channel that is.
        self.generation = 0
        self.open = 0
        # Connections of earlier channels that are still served: the daemon must not count on their room.
        self.older = 0

    def send(self, **message):
        try:
            self.channel.send(json.dumps(message).encode() + b"\n")
        except OSError:
            pass  # A daemon that is gone is noticed where messages are awaited.

    def serve(self, stream, client, generation, connection):
        try:
            Handler(stream, client, None)
        except OSError:
            pass  # A client that goes away is its own affair.
        stream.close()
        with self.lock:
            self.open -= 1
            if self.channel and generation == self.generation:
                self.send(type="done", connection=connection)
            elif self.channel:
                self.older -= 1
                self.send(type="capacity", capacity=CAPACITY - self.older)

    def take(self, channel):
        """Takes connections until the channel ends."""
        with self.lock:
            self.channel, self.older = channel, self.open
            self.generation += 1
            self.send(type="hello", version=VERSION, capacity=CAPACITY - self.open)
        while True:
            packet, descriptors, _, _ = socket.recv_fds(channel, MAX_MESSAGE, 1)
            if not packet:
                return
            message = json.loads(packet)
            if message["type"] == "error":
                raise OSError(message["message"])
            if message["type"] != "connection":
                continue  # Nothing has to be done about the welcome.
            if not descriptors:
                # None was left for it here: the connection has ended.
                with self.lock:
                    self.send(type="done", connection=message["connection"])
                continue
            with self.lock:
                self.open += 1
            address, _, port = message["client"].rpartition(":")
            client = (address.strip("[]"), int(port))
            arguments = (socket.socket(fileno=descriptors[0]), client, self.generation, message["connection"])
            threading.Thread(target=self.serve, args=arguments).start()

    def run(self, path):
        while True:
            try:
                if path:
                    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    channel.connect(path)
                else:
                    channel = socket.socket(fileno=int(os.environ["XO_POOL_FD"]))
                with channel:
                    self.take(channel)
            except OSError as e:
                print(f"worker {os.getpid()}: {e}", file=sys.stderr)
            with self.lock:
                self.channel = None
            if not path:
                # The daemon that started this worker is gone: its threads finish what they have.
                return
            time.sleep(AGAIN)


if __name__ == "__main__":
    Worker().run(sys.argv[1] if len(sys.argv) > 1 else None)
