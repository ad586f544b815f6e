"""A bad network between two processes: TCP connections that are slow, uneven, silent, or cut.

TCP keeps its bytes in order, so what overtakes what is one connection the other: uneven delays bring that about.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from concurrent.futures import Future
from dataclasses import dataclass

CHUNK_BYTES = 1 << 16
START_S = 10.0


@dataclass(frozen=True, slots=True)
class Weather:
    """What happens to each chunk of bytes: it comes `delay_s` later, and up to `jitter_s` more. `held`: none comes."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    held: bool = False


class Proxy:
    """Forwards from addresses of its own. Thread-safe; lives on an event loop in a thread, until the process ends."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._weather = Weather()
        self._broken = False
        self._changed: asyncio.Event = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()

    def forward(self, target: str) -> str:
        """An address on 127.0.0.1 behind which is `target`, host:port."""
        return self._call(self._listen(target))

    def turn(self, weather: Weather) -> None:
        """From the next chunk on; ends a cut."""

        async def change() -> None:
            self._weather, self._broken = weather, False
            self._changed.set()
            self._changed.clear()

        self._call(change())

    def cut(self) -> None:
        """Break every connection, and refuse new ones until the next `turn`."""

        async def break_all() -> None:
            self._broken = True
            for writer in self._writers:
                reset(writer)

        self._call(break_all())

    def close(self) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _call(self, work: object) -> str:
        future: Future[str] = asyncio.run_coroutine_threadsafe(work, self._loop)  # type: ignore[arg-type]
        return future.result(START_S)

    async def _listen(self, target: str) -> str:
        host, _, port = target.rpartition(":")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._broken:
                reset(writer)
                return
            try:
                there, back = await asyncio.open_connection(host, int(port))
            except OSError:
                reset(writer)
                return
            delay_s = self._rng.random()  # of all this connection, as a share of the jitter
            for source, sink in ((reader, back), (there, writer)):
                self._writers.add(sink)
                task = asyncio.get_running_loop().create_task(self._pump(source, sink, delay_s))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, share: float) -> None:
        try:
            while data := await source.read(CHUNK_BYTES):
                while self._weather.held:
                    await self._changed.wait()
                late_s = self._weather.delay_s + share * self._weather.jitter_s
                if late_s:
                    await asyncio.sleep(late_s)
                sink.write(data)
                await sink.drain()
            sink.write_eof()
        except OSError:
            reset(sink)
        finally:
            self._writers.discard(sink)


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a cut does, not in good order."""
    with contextlib.suppress(OSError):  # it has ended already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
