"""A TLS client by OpenSSL, which does what it is told by lines on standard input, and answers each with a line.

Usage: tls_client.py ADDRESS PORT CA_FILE TLSv1_2|TLSv1_3

  send TEXT N   one record with TEXT; only its first N bytes go out now (0: all)
  rest          the rest of it
  receive N     so many bytes: their SHA-256
  end           the server's close_notify, answered with ours
"""

import hashlib
import socket
import ssl
import sys

address, port, ca, version = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname = False
context.load_verify_locations(ca)
context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
network = socket.create_connection((address, int(port)), timeout=60)
network.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
# Between OpenSSL and the network, so that a record can be sent in pieces.
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
tls = context.wrap_bio(incoming, outgoing)


def until_done(work):
    """Does `work`, with what comes from the network as far as it needs it."""
    while True:
        try:
            return work()
        except ssl.SSLWantReadError:
            network.sendall(outgoing.read())
            received = network.recv(65536)
            if received:
                incoming.write(received)
            else:
                incoming.write_eof()


def receive(size):
    digest = hashlib.sha256()
    while size:
        piece = until_done(lambda: tls.read(min(size, 65536)))
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def end():
    # An end without close_notify is an SSLEOFError.
    more = until_done(lambda: tls.read(1))
    if more:
        return "there is more"
    try:
        tls.unwrap()
    except ssl.SSLSyscallError:
        pass
    network.sendall(outgoing.read())
    return "closed"


until_done(tls.do_handshake)
network.sendall(outgoing.read())
print(tls.cipher()[0], flush=True)
held = b""
for line in sys.stdin:
    verb, *words = line.split()
    answer = "done"
    if verb == "send":
        tls.write(words[0].encode())
        held = outgoing.read()
        cut = int(words[1]) or len(held)
        network.sendall(held[:cut])
        held = held[cut:]
    elif verb == "rest":
        network.sendall(held)
    elif verb == "receive":
        answer = receive(int(words[0]))
    elif verb == "end":
        answer = end()
    print(answer, flush=True)
