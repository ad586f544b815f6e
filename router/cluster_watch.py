"""What has changed in the cluster, for those who watch it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from core.messages import Load
from router.changing import Changing
from router.info import ClusterInfo, PairInfo, WorkerInfo

RECHECK_S = 2.0
"""What comes about without anybody telling, such as a worker that is forgotten, is noticed so late."""

PairKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class ClusterChange:
    """`workers` and `pairs` are new, or not what they were; of the others only the names are left."""

    workers: tuple[WorkerInfo, ...] = ()
    pairs: tuple[PairInfo, ...] = ()
    gone_workers: tuple[str, ...] = ()
    gone_pairs: tuple[PairKey, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.workers or self.pairs or self.gone_workers or self.gone_pairs)


class Known:
    """What one watcher was told. Load is no change: a worker without it is the same worker."""

    def __init__(self) -> None:
        self._workers: dict[str, WorkerInfo] = {}
        self._pairs: dict[PairKey, PairInfo] = {}

    def learn(self, info: ClusterInfo) -> ClusterChange:
        """What is new in `info`, which is known from now on."""
        workers = {each.worker_id: replace(each, load=Load(), num_credits_used=0) for each in info.workers}
        pairs = {(each.prefill_worker, each.decode_worker): each for each in info.pairs}
        change = ClusterChange(
            workers=tuple(
                each for each in info.workers if self._workers.get(each.worker_id) != workers[each.worker_id]
            ),
            pairs=tuple(each for key, each in pairs.items() if self._pairs.get(key) != each),
            gone_workers=tuple(name for name in self._workers if name not in workers),
            gone_pairs=tuple(key for key in self._pairs if key not in pairs),
        )
        self._workers, self._pairs = workers, pairs
        return change


class ClusterWatch(Changing):
    """Hands the changes of a cluster to any number of watchers. Lives on one event loop."""

    def __init__(self, info: Callable[[], ClusterInfo]) -> None:
        super().__init__()
        self._info = info

    async def changes(self) -> AsyncGenerator[ClusterChange]:
        """All that there is, even where that is nothing, then what changes, until `stop`."""
        known = Known()
        yield known.learn(self._info())
        while not self._stopping:
            changed = self._changed
            if change := known.learn(self._info()):
                yield change
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(RECHECK_S):
                    await changed.wait()
