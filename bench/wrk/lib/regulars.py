"""Long-lived connections that ask again and again: COUNT HOST PATH INTERVAL_S NODE LEAVE_AT_S END_S.

At LEAVE_AT_S those that NODE served last are closed. Prints requests, connections that left, and errors as JSON; says
"started" on a line of its own when all have been answered once.
"""

import asyncio
import json
import random
import sys
import time


class Regulars:
    """The connections, and what has come of them."""

    def __init__(self, arguments):
        self.count, self.host, self.path = int(arguments[0]), arguments[1], arguments[2]
        self.interval, self.node = float(arguments[3]), arguments[4]
        self.leave_at, self.end = float(arguments[5]), float(arguments[6])
        self.requests, self.left, self.errors = 0, 0, []
        self.started = asyncio.Event()
        self.answered = 0
        self.begun = 0.0

    async def ask(self, reader, writer):
        """One request; the node that answers."""
        writer.write(f"GET {self.path} HTTP/1.1\r\nHost: bench.test\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(head.split(b"\r\n")[0].decode())
        body = await reader.readexactly(int(fields[b"content-length"]))
        if body != b"".join(b"%015d\n" % i for i in range(len(body) // 16 + 1))[: len(body)]:
            raise ValueError("a body is not what it should be")
        self.requests += 1
        return fields[b"x-node"].decode()

    async def one(self):
        """One connection."""
        reader, writer = await asyncio.open_connection(self.host, 80)
        node = await self.ask(reader, writer)
        self.answered += 1
        if self.answered == self.count:
            self.started.set()
        await self.started.wait()
        left = False
        while (now := time.monotonic() - self.begun) < self.end:
            if now >= self.leave_at and not left:
                left = True
                if node == self.node:
                    self.left += 1
                    break
            node = await self.ask(reader, writer)
            await asyncio.sleep(self.interval * random.uniform(0.5, 1.5))
        writer.close()

    async def guarded(self):
        """Errors are counted; who cannot begin must not keep the others waiting."""
        try:
            await self.one()
        except (OSError, EOFError, ValueError) as error:
            self.errors.append(repr(error))
            self.started.set()

    async def run(self):
        """All of them."""
        tasks = [asyncio.create_task(self.guarded()) for _ in range(self.count)]
        await self.started.wait()
        self.begun = time.monotonic()
        print("started", flush=True)
        await asyncio.gather(*tasks)
        print(json.dumps({"requests": self.requests, "left": self.left, "errors": self.errors}))


if __name__ == "__main__":
    asyncio.run(Regulars(sys.argv[1:]).run())
