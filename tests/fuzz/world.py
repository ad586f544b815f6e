"""A whole router over workers in memory, and the proof that nothing is left of what was asked of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc.aio

from core.model_info import ModelInfo
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.app import RouterApp
from router.config import DispatchConfig, RouterConfig
from tests.router import fake_worker
from tests.router.fake_worker import FakeWorker
from tests.router.front_doors import END_OF_TEXT, make_tokenizer
from tests.router.harness import SESSIONS

MAX_MODEL_LEN = 128


@dataclass(frozen=True, slots=True)
class World:
    app: RouterApp
    fakes: tuple[FakeWorker, ...]

    async def until_nothing_is_left(self) -> None:
        """No request in the ledger, no block held, no message unsent; and books and workers without complaint."""
        await self.fakes[0].until(lambda: not self._left())  # looks again at every heartbeat
        self.app.dispatcher.check_integrity()
        assert [fake.problems for fake in self.fakes] == [[]] * len(self.fakes)

    def _left(self) -> bool:
        sessions = [worker.session for _, worker in self.app.workers.connected()]
        return bool(
            self.app.dispatcher.ledger.num_entries
            or any(fake.held for fake in self.fakes)
            or any(session and session.num_unsent for session in sessions)
        )


@asynccontextmanager
async def world(set_vocab_size: Callable[[int], None]) -> AsyncIterator[World]:
    """Two pairs' worth of workers and a mixed one. `set_vocab_size` is told what the workers may draw from."""
    tokenizer = make_tokenizer()
    set_vocab_size(tokenizer.vocab_size)
    model = ModelInfo("tiny", "TinyForCausalLM", "f00d", tokenizer.vocab_size, MAX_MODEL_LEN, (END_OF_TEXT,))
    dispatch = DispatchConfig(stats_grace_s=0.01)
    sessions = replace(SESSIONS, dead_after_s=60.0, forget_after_s=3600.0)  # they register once, and may have to wait
    config = RouterConfig(grpc_port=0, http_port=0, sessions=sessions, dispatch=dispatch, tool_call_parser="hermes")
    app = RouterApp(config, model=model, tokenizer=tokenizer)
    await app.start()
    fakes = tuple(
        FakeWorker(name, role, num_credits=512)
        for name, role in (("prefill-0", "prefill"), ("decode-0", "decode"), ("mixed-0", "mixed"))
    )
    try:
        async with grpc.aio.insecure_channel(app.grpc_address) as channel:
            for fake in fakes:
                await fake.start()
                await worker_pb2_grpc.RegistryStub(channel).Register(
                    worker_pb2.RegisterRequest(
                        worker_id=fake.worker_id,
                        incarnation=fake.incarnation,
                        address=fake.address,
                        role=fake_worker.ROLES[fake.role],
                    )
                )
        await fakes[0].until(lambda: len(app.workers.routes()) >= 2)
        yield World(app, fakes)
    finally:
        for fake in fakes:
            await fake.kill()
        await app.stop(0.0)
