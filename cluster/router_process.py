"""A router as a process. Loads no torch."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading

from cluster.spec import Endpoints, RouterSpec
from engine.model_config import model_info
from router.app import RouterApp, url_host
from telemetry.logs import configure_logging
from text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::")
START_TIMEOUT_S = 30.0
DRAIN_GRACE_S = 10.0
"""How long running requests may go on after the router was asked to stop."""


class RouterProcess:
    """Owns an event loop in a thread of its own, and the router on it; `drain` ends both."""

    def __init__(self, spec: RouterSpec, node_host: str) -> None:
        """`node_host`: where this machine is reached, for a router that listens on all its addresses."""
        self._spec, self._node_host = spec, node_host
        self._loop = asyncio.new_event_loop()
        self._draining = asyncio.Event()
        self._ended = threading.Event()
        self._exit_code = 0

    def start(self) -> Endpoints:
        """Listen; where. Raises CheckpointError or ConfigError."""
        configure_logging(sys.stderr, level=self._spec.log_level)
        spec = self._spec
        model = model_info(spec.model, spec.model_name, spec.max_model_len)
        self._app = RouterApp(
            spec.config, model=model, tokenizer=Tokenizer.from_folder(spec.model), security=spec.security
        )
        threading.Thread(target=self._run_loop, name="router", daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._app.start(), self._loop).result(START_TIMEOUT_S)
        asyncio.run_coroutine_threadsafe(self._serve(), self._loop)
        app, host = self._app, url_host(spec.config.host)
        grpc, http, registry = app.grpc_address, app.http_address, app.registry_address
        if spec.config.host in WILDCARDS:
            here = url_host(self._node_host)
            grpc, http, registry = (address.replace(host, here, 1) for address in (grpc, http, registry))
        return Endpoints(grpc, http, registry)

    def drain(self) -> None:
        """Refuse what is new, let what runs end within a grace, then end. Returns at once."""
        self._loop.call_soon_threadsafe(self._draining.set)

    def wait(self) -> int:
        self._ended.wait()
        return self._exit_code

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _serve(self) -> None:
        await self._draining.wait()
        try:
            await asyncio.wait_for(self._app.stop(DRAIN_GRACE_S), 2 * DRAIN_GRACE_S)
        except Exception:
            log.exception("the router did not stop in order")
            self._exit_code = 1
        finally:
            self._ended.set()
