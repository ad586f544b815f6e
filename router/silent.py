"""An observer for those that have none."""

from __future__ import annotations

from core.events import LifecycleEvent
from core.messages import TransferStats
from core.ticket import Ticket
from router.ledger import Entry


class Silent:
    """Observes nothing."""

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None: ...

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None: ...

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None: ...

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None: ...

    def on_cluster_change(self) -> None: ...
