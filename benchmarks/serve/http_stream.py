"""HTTP/1.1 as a load generator needs it: one POST, its answer piece by piece, the time of each. One connection each."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from core.errors import ConfigError

MAX_HEADER_BYTES = 64 * 1024
MAX_PIECE_BYTES = 64 * 1024 * 1024


class HttpError(Exception):
    """The server could not be reached, hung up, or does not speak HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Url:
    """Where requests go."""

    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def parse(cls, base_url: str, endpoint: str) -> Url:
        """`endpoint` is added to the base's own path. `ConfigError` where the base is no http or https URL."""
        parts = urlsplit(base_url)
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError("base_url", base_url, f"must be a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError("base_url", base_url, "must be a URL such as 'http://127.0.0.1:8000'")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/")
        if path.endswith("/v1") and endpoint.startswith("/v1/"):
            path = path.removesuffix("/v1")  # as OpenAI's own clients are given it
        return cls(parts.hostname, port or (443 if tls else 80), path + endpoint, tls)

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def request_bytes(method: str, url: Url, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    lines = [
        f"{method} {url.path} HTTP/1.1",
        f"Host: {url.authority}",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class HttpStream:
    """One exchange. `status` is known once it is entered; then read `pieces`. Raises `HttpError`."""

    def __init__(self, url: Url, request: bytes) -> None:
        self._url = url
        self._request = request
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        context = ssl.create_default_context() if self._url.tls else None
        try:
            self._reader, self._writer = await asyncio.open_connection(
                self._url.host, self._url.port, ssl=context, limit=MAX_HEADER_BYTES
            )
        except OSError as error:
            raise HttpError(f"can't reach {self._url.authority}: {error.strerror or error}") from error
        try:
            self._writer.write(self._request)
            await self._writer.drain()
            self._read_head(await self._reader.readuntil(b"\r\n\r\n"))
        except BaseException as error:
            self._writer.close()
            raise _told(error) from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def _read_head(self, head: bytes) -> None:
        status, *fields = head.decode("latin-1").split("\r\n")
        version, _, rest = status.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise HttpError(f"no HTTP/1.1 answer: {status[:60]!r}")
        self.status = int(rest[:3])
        pairs = (field.partition(":") for field in fields if field)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, chunk by chunk."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                async for piece in self._chunks():
                    yield piece
                return
            left = int(self.headers.get("content-length", MAX_PIECE_BYTES))
            while left and (piece := await self._reader.read(min(left, 65536))):
                left -= len(piece)
                yield piece
            if left and "content-length" in self.headers:
                raise HttpError("the server hung up in the middle of its answer")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError) as error:
            raise _told(error) from error

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._reader.readuntil(b"\n")
            size = int(line.partition(b";")[0], 16)
            if not 0 <= size <= MAX_PIECE_BYTES:
                raise HttpError(f"a chunk of {size} bytes")
            piece = await self._reader.readexactly(size + 2)
            if size == 0:
                return
            yield piece[:-2]

    async def body(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


def _told(error: BaseException) -> BaseException:
    match error:
        case asyncio.IncompleteReadError():
            return HttpError("the server hung up in the middle of its answer")
        case OSError() | asyncio.LimitOverrunError() | ValueError():
            return HttpError(f"no proper answer: {error}")
        case _:
            return error


def sse_data(buffer: bytearray) -> Iterable[bytes]:
    """The data of each whole line in `buffer`, which is left with what is not a whole line yet."""
    end = buffer.rfind(b"\n") + 1
    lines = bytes(buffer[:end]).splitlines()
    del buffer[:end]
    return [line[5:].strip() for line in lines if line.startswith(b"data:")]
