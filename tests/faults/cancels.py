"""How long a cancel is on its way from a client to a worker, whose engine stands still, in each state of a request."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from cluster.steps import Step
from penstock import Client, RequestCancelledError
from tests.faults.control import QUICK, World

HOLDERS = {
    Step.RESERVE: "decode-0",
    Step.PREFILL: "prefill-0",
    Step.PUSH: "prefill-0",
    Step.COMMIT: "prefill-0",
    Step.ACCEPT: "decode-0",
    Step.TOKENS: "decode-0",
    Step.RELEASE: "prefill-0",
}
"""The worker that takes each step, and is held at it."""


def delivery_s(world: World, client: Client, step: Step, name: str) -> float:
    """From the client's call until the worker stops the transfer; its engine is held at `step` all the while.

    At the release of the prefill worker it is the decode worker that is told: the other holds nothing that is wanted.
    """
    holder, told = HOLDERS[step], "decode-0" if step is Step.RELEASE else HOLDERS[step]
    world.steps.forget_cancels(told)
    world.steps.arm(holder, step, "hold", 3 if step is Step.PUSH else 0)

    def ask() -> None:
        generation = client.generate(
            token_ids=tuple(range(20, 120)), max_tokens=1000, temperature=0, ignore_eos=True, request_id=name
        )
        try:
            for _ in generation:
                pass
        except RequestCancelledError:
            return
        raise AssertionError("it was not cancelled")

    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(ask)
        world.steps.reached(holder)
        cancelled_at = time.monotonic()
        assert client.cancel(name)
        took_s = world.steps.cancelled(told) - cancelled_at
        world.steps.go(holder)
        asked.result()
    world.wait_until_nothing_is_held(QUICK.lease_s)  # else the next is held at what is left of this one
    return took_s
