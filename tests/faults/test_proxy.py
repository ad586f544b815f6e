"""The bad network does what it is asked to: else tests over it would show nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Proxy, Weather

WAIT_S = 10.0


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that says what it hears."""

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def say(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    heard = b""
    while len(heard) < len(data) and (part := connection.recv(1 << 16)):
        heard += part
    return heard


def test_what_goes_through_is_the_same_and_its_end_as_well(proxy: Proxy, echo: str) -> None:
    data = bytes(range(256)) * 2000
    with dial(proxy.forward(echo)) as connection:
        assert say(connection, data) == data
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_bytes_come_late(proxy: Proxy, echo: str) -> None:
    with dial(proxy.forward(echo)) as connection:
        proxy.turn(Weather(delay_s=0.1))
        started_at = time.monotonic()
        assert say(connection, b"x") == b"x"
        assert time.monotonic() - started_at >= 0.2, "a tenth each way"


def test_what_is_held_comes_when_the_weather_turns(proxy: Proxy, echo: str) -> None:
    with dial(proxy.forward(echo)) as connection:
        assert say(connection, b"x") == b"x"
        proxy.turn(Weather(held=True))
        connection.sendall(b"y")
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        proxy.turn(Weather())
        connection.settimeout(WAIT_S)
        assert connection.recv(1) == b"y"


def test_a_cut_breaks_what_there_is_and_refuses_what_comes(proxy: Proxy, echo: str) -> None:
    address = proxy.forward(echo)
    with dial(address) as connection:
        assert say(connection, b"x") == b"x"
        proxy.cut()
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionError), dial(address) as refused:  # while it is being made, or once it is read
        refused.recv(1)
    proxy.turn(Weather())
    with dial(address) as again:
        assert say(again, b"x") == b"x"
