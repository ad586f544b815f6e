"""What operators do to a running cluster: `penstock.v1.Admin`."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable

import grpc.aio

from core.errors import ConfigError, InvalidRequestError, UnavailableError, UnknownWorkerError
from penstock.v1 import admin_pb2 as pb
from router.config import PlacementConfig
from router.dispatcher import Dispatcher
from router.errors import aborting
from router.policies import make_policy
from router.rpc_handlers import Context, add_service, readable
from router.workers import Workers

log = logging.getLogger(__name__)

ADMIN = "penstock.v1.Admin"
DRAIN_S = 30.0
"""What a worker may take to end what it has, where nobody says."""
MAX_DRAIN_S = 24 * 3600.0
FLUSH_TIMEOUT_S = 10.0
"""For a worker to answer, which it does between two steps."""


class PolicySwitch:
    """Has a dispatcher place by another policy, and tells the old one's name. `ConfigError` for an unknown one."""

    def __init__(self, dispatcher: Dispatcher, config: PlacementConfig) -> None:
        self._dispatcher, self._config = dispatcher, config
        self._name: str = config.policy

    def __call__(self, name: str) -> str:
        self._dispatcher.policy = make_policy(name, self._config.tuning)
        previous, self._name = self._name, name
        self._dispatcher.on_change()
        return previous


class AdminService:
    def __init__(self, workers: Workers, set_policy: Callable[[str], str]) -> None:
        """`set_policy` as `PolicySwitch`."""
        self._workers = workers
        self._set_policy = set_policy

    async def drain(self, received: pb.DrainRequest | InvalidRequestError, context: Context) -> pb.DrainResponse:
        async with aborting(context):
            request = readable(received)
            deadline_s = request.deadline_s if request.HasField("deadline_s") else DRAIN_S
            if not (math.isfinite(deadline_s) and 0 <= deadline_s <= MAX_DRAIN_S):
                raise InvalidRequestError("deadline_s", deadline_s, f"must be in [0, {MAX_DRAIN_S:g}] seconds")
            if not self._workers.drain(request.worker_id, deadline_s):
                raise self._unknown(request.worker_id)
            return pb.DrainResponse()

    async def flush_prefix_cache(
        self, received: pb.FlushPrefixCacheRequest | InvalidRequestError, context: Context
    ) -> pb.FlushPrefixCacheResponse:
        async with aborting(context):
            request = readable(received)
            names = [request.worker_id] if request.worker_id else self._connected()
            answers = {name: self._workers.flush_prefix_cache(name) for name in names}
            flushed = []
            for name, answer in answers.items():
                if answer is None:
                    raise self._unknown(name)
                flushed.append(pb.FlushedCache(worker_id=name, num_blocks=await _answer(name, answer)))
            return pb.FlushPrefixCacheResponse(workers=flushed)

    async def set_policy(
        self, received: pb.SetPolicyRequest | InvalidRequestError, context: Context
    ) -> pb.SetPolicyResponse:
        async with aborting(context):
            name = readable(received).policy
            try:
                previous = self._set_policy(name)
            except ConfigError as error:
                raise InvalidRequestError("policy", name, error.fix) from error
            log.info("requests are placed by %s from now on, not by %s", name, previous)
            return pb.SetPolicyResponse(previous=previous)

    def _connected(self) -> list[str]:
        return sorted(hello.worker_id for hello, _ in self._workers.connected())

    def _unknown(self, worker_id: str) -> UnknownWorkerError:
        return UnknownWorkerError(worker_id, self._connected())


async def _answer(worker_id: str, answer: asyncio.Future[int]) -> int:
    done, _ = await asyncio.wait([answer], timeout=FLUSH_TIMEOUT_S)
    if not done or answer.cancelled():
        why = "was lost before it answered" if done else f"has not answered within {FLUSH_TIMEOUT_S:g} s"
        raise UnavailableError(f"worker {worker_id} {why}")
    return answer.result()


def add_admin(service: AdminService, server: grpc.aio.Server) -> None:
    unary = {
        "Drain": (service.drain, pb.DrainRequest),
        "SetPolicy": (service.set_policy, pb.SetPolicyRequest),
        "FlushPrefixCache": (service.flush_prefix_cache, pb.FlushPrefixCacheRequest),
    }
    add_service(server, ADMIN, unary)
