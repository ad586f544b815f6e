"""What wakes those who watch something that changes."""

from __future__ import annotations

import asyncio


class Changing:
    """Wakes all who wait for the next change, until it stops. Lives on one event loop."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        """Set at the next change, and then replaced: to be taken before one looks at what may change."""
        self._stopping = False

    def on_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def stop(self) -> None:
        """Everyone who watches ends."""
        self._stopping = True
        self.on_change()
