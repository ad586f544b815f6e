"""The door of a worker: whoever comes says first for which pair, and nobody waits for those who don't."""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

NAME_BYTES = 16
"""What a visitor says: the name of its pair."""
GREETING_TIMEOUT_S = 1.0
"""For a visitor to say it."""
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


@dataclass(slots=True)
class _Visitor:
    ends_at: float
    name: bytes = b""


class Door:
    """Listens on `host` until `close`. `take_in` gets the name of a pair and the visitor's socket, which it then owns.

    One thread, which serves all visitors at once and calls `take_in`.
    """

    def __init__(self, host: str, backlog: int, take_in: Callable[[bytes, socket.socket], None]) -> None:
        self._take_in = take_in
        self._server = socket.create_server((host, 0), backlog=backlog)
        self._server.setblocking(False)
        self.port = int(self._server.getsockname()[1])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="kv-welcome", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Nobody is let in any more; returns when the thread has ended."""
        self._closed.set()
        with contextlib.suppress(OSError):  # it has ended by itself
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it
        self._thread.join()

    def _serve(self) -> None:
        with self._server, selectors.DefaultSelector() as waiting:
            waiting.register(self._server, selectors.EVENT_READ)
            while not self._closed.is_set():
                until = min((key.data.ends_at for key in _visitors(waiting)), default=None)
                for key, _ in waiting.select(None if until is None else max(0.0, until - time.monotonic())):
                    if key.data is None:
                        self._let_in(waiting)
                    else:
                        self._listen(waiting, key)
                for key in _visitors(waiting):
                    if key.data.ends_at <= time.monotonic():
                        _send_away(waiting, key)
            for key in _visitors(waiting):
                _send_away(waiting, key)

    def _let_in(self, waiting: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as error:
            log.debug("a visitor is lost: %s", error)
            if error.errno in _NO_DESCRIPTORS:
                self._closed.wait(GREETING_TIMEOUT_S)
            return
        connection.setblocking(False)
        waiting.register(connection, selectors.EVENT_READ, _Visitor(time.monotonic() + GREETING_TIMEOUT_S))

    def _listen(self, waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
        connection, visitor = key.fileobj, key.data
        assert isinstance(connection, socket.socket)
        try:
            part = connection.recv(NAME_BYTES - len(visitor.name))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        visitor.name += part
        if not part:
            _send_away(waiting, key)
        elif len(visitor.name) == NAME_BYTES:
            waiting.unregister(connection)
            self._take_in(visitor.name, connection)


def _visitors(waiting: selectors.BaseSelector) -> list[selectors.SelectorKey]:
    return [key for key in waiting.get_map().values() if key.data is not None]


def _send_away(waiting: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    assert isinstance(key.fileobj, socket.socket)
    waiting.unregister(key.fileobj)
    key.fileobj.close()
