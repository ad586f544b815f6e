"""What Python 3.10 does not have yet."""

from __future__ import annotations

import asyncio
import sys

if sys.version_info >= (3, 11):  # noqa: UP036 (older than what the server needs)
    from enum import StrEnum
else:
    from enum import Enum

    class StrEnum(str, Enum):  # noqa: UP042
        """Its members are their values, also as text."""

        __str__ = str.__str__


def being_cancelled(*, closed: bool) -> bool:
    """Whether it is the running task that is cancelled: gRPC raises CancelledError for a cancelled call as well.

    Python 3.10 does not tell; there it is the call where this client has `closed` it, else the task.
    """
    task = asyncio.current_task()
    cancelling = getattr(task, "cancelling", None)
    if cancelling is None:
        return task is not None and not closed
    return bool(cancelling() > 0)


__all__ = ["StrEnum", "being_cancelled"]
