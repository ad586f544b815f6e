"""A cancel stops the transfer when it comes, whatever the engine is at; one turn later all blocks are free."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.messages import Cancel
from tests.faults.sim_worker import NUM_BLOCKS
from tests.faults.simulation import Job, Simulation

PROMPT = tuple(range(10, 27))
"""17 tokens: three steps."""
STAGES = (
    "reserve is on its way",
    "reserved",
    "prefill is on its way",
    "prefilling",
    "committed",
    "segments are on their way",
    "accepted, a segment is missing",
    "accepted",
    "decoding",
)


def decode_turns(sim: Simulation) -> None:
    decode = sim.workers["d0"]
    while decode.commands:
        sim.obey(decode)
    decode.turn()


def prefill_turn(sim: Simulation) -> None:
    prefill = sim.workers["p"]
    while prefill.commands:
        sim.obey(prefill)
    prefill.turn()


def hear(name: str) -> Callable[[Simulation], None]:
    def all_of_it(sim: Simulation) -> None:
        while sim.workers[name].session.events:
            sim.hear(sim.workers[name])

    return all_of_it


def leave(sim: Simulation) -> None:
    while sim.links["d0"].outbox:
        sim.leave(sim.links["d0"])


def arrive(keep: int) -> Callable[[Simulation], None]:
    def all_but(sim: Simulation) -> None:
        while len(sim.wire) > keep:
            sim.arrive(0, "whole")

    return all_but


STEPS: tuple[tuple[Callable[[Simulation], None], ...], ...] = (
    (),
    (decode_turns,),
    (hear("d0"),),
    (prefill_turn,),
    (prefill_turn, prefill_turn),
    (leave,),
    (hear("p"), decode_turns, arrive(1)),
    (arrive(0), decode_turns),
    (hear("d0"), decode_turns),
)


@pytest.mark.parametrize("stage", range(len(STAGES)), ids=STAGES)
def test_a_cancel_stops_at_once_and_frees_all_blocks_in_the_next_turn(stage: int) -> None:
    sim = Simulation()
    sim.submit(PROMPT, 6)
    (job,) = sim.jobs.values()
    sim.place(job, "d0")
    for steps in STEPS[: stage + 1]:
        for step in steps:
            step(sim)
    ticket = job.ticket
    assert ticket is not None
    assert_stage(sim, job, stage)
    sim.cancel(job)
    for worker in (sim.workers["p"], sim.workers["d0"]):
        while worker.commands:
            sim.obey(worker)  # its engine does not turn meanwhile
    assert not sim.links["d0"].outbox, "what has not left does not leave any more"
    before = sim.workers["d0"].plane.receiver.num_discarded_segments
    num_late = len(sim.wire)
    arrive(0)(sim)
    assert sim.workers["d0"].plane.receiver.num_discarded_segments == before + num_late
    for worker in (sim.workers["p"], sim.workers["d0"]):
        worker.turn()
        worker.assert_nothing_is_held()
    assert [command for _, command in sim.said if isinstance(command, Cancel)]


def assert_stage(sim: Simulation, job: Job, stage: int) -> None:
    """The steps before have led where the name of the stage says."""
    held = {name: NUM_BLOCKS - sim.workers[name].pool.num_free_blocks for name in ("p", "d0")}
    assert (held["d0"] > 0) == (stage >= STAGES.index("reserved"))
    assert (held["p"] > 0) == (stage >= STAGES.index("prefilling"))
    assert bool(sim.wire) == (stage in (5, 6))
    assert (job.stage == "decoding") == (stage >= STAGES.index("decoding"))
