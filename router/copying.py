"""K and V on their way from one worker's cache to another's, for nobody's stream."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Protocol

from core.clock import Clock
from core.request import Request
from core.sampling import SamplingParams
from router.ledger import Entry, Ledger
from router.policies.model import Route
from router.stream import RequestStream


class Copy(Protocol):
    """What begins a copy, and ends one."""

    def copy(self, entry: Entry, route: Route) -> None: ...

    def fence(self, entry: Entry, reason: str) -> None: ...


SAMPLING = SamplingParams(max_tokens=2, temperature=0.0)
"""The sender draws a token, as always, and is not done with it; nobody looks at it."""


def copy_blocks(
    flow: Copy,
    ledger: Ledger,
    clock: Clock,
    route: Route,
    request: Request,
    num_tokens: int,
    on_copied: Callable[[bool], None],
) -> Entry:
    """Send the first `num_tokens` tokens of the request, which fill blocks, from `route.prefill` to `route.decode`.

    `on_copied` is told once whether they came; if not, nothing has changed. Both are left as every attempt leaves them.
    """
    transfer_id = uuid.uuid4().hex
    copied = Request(
        f"copy-{transfer_id}", request.token_ids(0, num_tokens + 1), SAMPLING, cache_salt=request.cache_salt
    )
    stream = RequestStream(copied.request_id, max_buffered_tokens=16, on_cancel=lambda: None, on_stop=lambda: None)
    entry = Entry(copied, stream, 0, transfer_id, arrived_s=clock(), on_copied=on_copied)
    ledger.open_copy(entry)
    flow.copy(entry, route)
    return entry
