"""What is said to workers about attempts, and the holds that follow from it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from core.messages import Accept, Cancel, Prefill, Release, Reserve
from router.config import DispatchConfig
from router.ledger import Counts, Hold, Ledger
from router.outbox import in_parts
from router.workers import Workers


class Teller:
    """`on_dropped` hears of every hold that is gone."""

    def __init__(
        self,
        config: DispatchConfig,
        *,
        workers: Workers,
        ledger: Ledger,
        counts: Counts,
        on_dropped: Callable[[Hold], None],
    ) -> None:
        self._config, self._workers, self._ledger, self._counts = config, workers, ledger, counts
        self._on_dropped = on_dropped

    def tell(self, hold: Hold, command: Reserve | Prefill | Accept) -> None:
        hold.told = True
        if isinstance(command, Accept):
            self._workers.send(hold.incarnation, command)
        else:
            self._workers.send(hold.incarnation, *in_parts(command, self._config.prompt_part_tokens))

    def let_go(self, hold: Hold, command: Cancel | Release) -> None:
        """Tell the worker, and wait for its word for as long as it might take its lease to run out."""
        if not hold.told:
            self.drop(hold)
            return
        hold.closing = True
        self._workers.send(hold.incarnation, command)
        loop = asyncio.get_running_loop()
        hold.timer = loop.call_later(self._config.release_timeout_s, self._on_release_overdue, hold)

    def drop(self, hold: Hold) -> None:
        """The worker holds nothing of the attempt any more."""
        self._ledger.drop(hold)
        self._on_dropped(hold)

    def _on_release_overdue(self, hold: Hold) -> None:
        self._counts.release_timeouts += 1
        self._ledger.note_worker_failure(hold.entry, hold.incarnation, "release_overdue")
        self.drop(hold)
