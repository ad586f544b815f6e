"""A server with the OpenAI API on 127.0.0.1 whose delays are known: it answers as scripted and notes when.

It is what the load tool itself is measured against (`benchmarks.serve.overhead`) and tested with.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 20.0
Piece = bytes | float
"""What is written as one chunk, or for how long nothing is."""


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str = "a", finish_reason: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish_reason}])


def usage(num_inputs: int, num_outputs: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": num_inputs, "completion_tokens": num_outputs})


DONE = b"data: [DONE]\n\n"


@dataclass
class KnownServer:
    """`written_s` are the times of the chunks, on the clock of `time.perf_counter`, call by call."""

    pieces: Sequence[Piece] = (token(), token(), usage(3, 2), DONE)
    status: str = "200 OK"
    whole: bytes | None = None
    """Instead of chunks: one body with its length."""
    cut: bool = False
    """Hang up before the last chunk."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    written_s: list[list[float]] = field(default_factory=list)
    url: str = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.arrived_s.append(time.perf_counter())
        self.heads.append(head)
        length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
        body = await reader.readexactly(length)
        if "/health" in head:
            await _write_whole(writer, "200 OK", b"{}")
            return
        if "/models" in head:
            await _write_whole(writer, "200 OK", b'{"data": [{"id": "tiny"}]}')
            return
        self.requests.append(json.loads(body))
        if self.whole is not None:
            await _write_whole(writer, self.status, self.whole)
            return
        writer.write(f"HTTP/1.1 {self.status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        written: list[float] = []
        self.written_s.append(written)
        for piece in self.pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            written.append(time.perf_counter())
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        if not self.cut:
            writer.write(b"0\r\n\r\n")
        writer.close()


async def _write_whole(writer: asyncio.StreamWriter, status: str, body: bytes) -> None:
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    writer.close()


@contextmanager
def serving(fake: KnownServer, port: int = 0) -> Iterator[KnownServer]:
    """In a thread of its own."""
    ready, stop = threading.Event(), _Stop()

    async def serve() -> None:
        server = await asyncio.start_server(fake.answer, "127.0.0.1", port)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        stopped = asyncio.Event()
        stop.by(asyncio.get_running_loop(), stopped.set)
        ready.set()
        async with server:
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield fake
    finally:
        stop()
        thread.join(DEADLINE_S)


class _Stop:
    def by(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        self._loop, self._stop = loop, stop

    def __call__(self) -> None:
        self._loop.call_soon_threadsafe(self._stop)


def main() -> None:
    """Serves `argv[1]` tokens an answer, `argv[2]` seconds apart; prints its address, and at the end of stdin what it
    noted. Clocks of processes on one machine agree: `time.perf_counter` counts from its start.

    With `argv[3]`, a port, it serves there until it is ended.
    """
    num_tokens, gap_s = int(sys.argv[1]), float(sys.argv[2])
    pieces: list[Piece] = [part for _ in range(num_tokens) for part in (gap_s, token())]
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with serving(KnownServer([*pieces, usage(0, num_tokens), DONE]), port) as server:
        print(server.url, flush=True)
        if port:
            threading.Event().wait()
        sys.stdin.read()
        print(json.dumps({"arrived_s": server.arrived_s, "written_s": server.written_s}))


if __name__ == "__main__":
    main()
