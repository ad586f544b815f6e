"""One worker as the router knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from core.messages import Load, WorkerHello
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

    @property
    def incarnation(self) -> str:
        return self.registration.incarnation

    @property
    def hello(self) -> WorkerHello | None:
        return self.session.hello if self.session else None


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
