"""uvicorn inside a loop that is already there, with addresses that are known before it serves."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from core.errors import ConfigError
from router.access.config import SecurityConfig

KEEP_ALIVE_S = 60
MIN_GRACE_S = 0.1
"""With less, uvicorn would report an error even where nobody is connected."""


class HttpServer:
    """Bound when made, serving from `start` to `stop`. `ConfigError` where the address can't be had."""

    def __init__(self, app: ASGIApp, host: str, port: int, security: SecurityConfig | None = None) -> None:
        security = security or SecurityConfig()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except (OSError, UnicodeError) as error:
            self._socket.close()
            raise ConfigError("router.http_port", port, f"can't be listened on at {host}: {error}") from error
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
            ssl_keyfile=security.ssl_keyfile,
            ssl_certfile=security.ssl_certfile,
            ssl_ca_certs=str(security.ssl_ca_certs) if security.ssl_ca_certs else None,
            ssl_cert_reqs=security.ssl_cert_reqs,
        )
        _load_certificates(config)
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._socket.listen()
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self, grace_s: float) -> None:
        """No new connections; those there are have `grace_s` to end by themselves. Idempotent."""
        if self._serving is None:
            self._socket.close()
            return
        # What is not over by then is cancelled by uvicorn; the second limit is for the case that this does not help.
        self._server.config.timeout_graceful_shutdown = max(grace_s, MIN_GRACE_S)  # type: ignore[assignment]
        self._server.should_exit = True
        await asyncio.wait({self._serving}, timeout=grace_s + 1.0)
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._serving = None
        self._socket.close()  # only now: the loop must not be listening on it any more


def _load_certificates(config: uvicorn.Config) -> None:
    """Here and not when it is too late to say what is wrong."""
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError("security.ssl_certfile", config.ssl_certfile, f"can't be used: {error}") from error


class _Server(uvicorn.Server):
    """Signals belong to the process, not to one of its servers."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
