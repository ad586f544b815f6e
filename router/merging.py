"""Several generations, read side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from core.errors import PenstockError
from router.generation import Done, Generation, Generator, TextDelta
from router.validation import ValidRequest

Event = TextDelta | Done
Merged = asyncio.Queue[tuple[int, Event | Exception | None]]
"""None marks the end of one."""


def start_all(generator: Generator, valids: Sequence[ValidRequest]) -> list[Generation]:
    """All are queued, or none: then the error of the first that was not let in."""
    started: list[Generation] = []
    try:
        for valid in valids:
            generation = generator.start(valid)
            started.append(generation)
    except PenstockError:
        for generation in started:
            generation.close()
        raise
    return started


async def merge(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Event | Exception]]:
    """(index, event) as they come; a generation that fails ends with its error, and the others go on."""
    merged: Merged = asyncio.Queue(len(generations))
    pumps = [asyncio.create_task(_pump(i, each, merged)) for i, each in enumerate(generations)]
    try:
        running = len(pumps)
        while running:
            index, came = await merged.get()
            if came is None:
                running -= 1
            else:
                yield index, came
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(index: int, generation: Generation, merged: Merged) -> None:
    try:
        async for event in generation:
            await merged.put((index, event))
    except Exception as error:  # noqa: BLE001 - handed to who reads
        await merged.put((index, error))
    await merged.put((index, None))
