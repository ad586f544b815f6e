"""One worker as the router knows it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field, replace

from core.messages import FlushCache, Load, WorkerHello
from router.info import WorkerInfo
from router.rpc import Registration
from router.session import Session


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of a worker. `session` is set while it is connected; `problem` says why it is not."""

    registration: Registration
    registered_s: float
    task: asyncio.Task[None] | None = None
    session: Session | None = None
    load: Load = field(default_factory=Load)
    draining: bool = False
    problem: str = "not connected yet"
    flushes: deque[asyncio.Future[int]] = field(default_factory=deque)
    """Answers that are awaited, in the order in which they were asked for."""

    @property
    def incarnation(self) -> str:
        return self.registration.incarnation

    @property
    def hello(self) -> WorkerHello | None:
        return self.session.hello if self.session else None

    def flush(self) -> asyncio.Future[int] | None:
        """Have it forget the cached prefixes that no request holds; how many blocks those were. None where it is not
        connected; the future is cancelled where its session ends before it answers."""
        if self.session is None:
            return None
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.flushes.append(answer)
        self.session.send(FlushCache())
        return answer

    def on_flushed(self, num_blocks: int) -> None:
        if self.flushes and not (answer := self.flushes.popleft()).done():
            answer.set_result(num_blocks)

    def forget_flushes(self) -> None:
        while self.flushes:
            self.flushes.popleft().cancel()


def describe(worker: Worker, num_credits_used: int) -> WorkerInfo:
    registration, hello = worker.registration, worker.hello
    return WorkerInfo(
        worker_id=registration.worker_id,
        incarnation=registration.incarnation,
        role=hello.role if hello else registration.role,
        address=registration.address,
        connected=hello is not None,
        draining=worker.draining,
        load=worker.load if hello else replace(worker.load, num_free_blocks=0),
        num_blocks=hello.num_blocks if hello else 0,
        credits=hello.credits if hello else 0,
        num_credits_used=num_credits_used,
        device=hello.device if hello else "",
        problem=worker.problem,
    )
