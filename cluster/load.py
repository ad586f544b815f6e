"""What a worker tells of its state."""

from __future__ import annotations

from core.messages import Load
from engine.engine import Engine


def load_of(engine: Engine, *, draining: bool) -> Load:
    scheduler, pool, index = engine.scheduler, engine.pool, engine.pool.index
    drafts, parking = scheduler.draft_counts, scheduler.parking_counts
    return Load(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting + scheduler.num_parked,
        num_held=scheduler.num_held,
        num_free_blocks=pool.num_free_blocks,
        num_preemptions=scheduler.num_preemptions,
        num_waiting_tokens=scheduler.num_waiting_tokens,
        draining=draining,
        num_prefix_queries=index.num_queries if index is not None else 0,
        num_prefix_hits=index.num_hits if index is not None else 0,
        mask_wait_s=engine.runner.mask_wait_s,
        num_drafts=drafts.num_drafts,
        num_draft_tokens=drafts.num_draft_tokens,
        num_accepted_tokens=drafts.num_accepted_tokens,
        num_parked=scheduler.num_parked,
        parked_bytes=parking.num_held_blocks * engine.layout.bytes_per_block,
        num_parks=parking.num_parks,
        num_recomputes=parking.num_recomputes,
    )
