"""W3C Trace Context: which trace a request belongs to, as `traceparent` says it (https://www.w3.org/TR/trace-context/)."""

from __future__ import annotations

import re
from collections.abc import Callable

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")


def child_of(traceparent: str, draw_bits: Callable[[int], int]) -> str:
    """The `traceparent` of a span of our own within the caller's trace; empty where the caller's makes no sense, which
    is then to be ignored."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or (traceparent.startswith("00-") and match[3]):
        return ""
    return f"00-{match[1]}-{draw_bits(64) or 1:016x}-{match[2]}"


def log_fields(traceparent: str) -> dict[str, str]:
    """`extra` of a log record, under OpenTelemetry's names; nothing where there is no trace."""
    if not traceparent:
        return {}
    _, trace_id, span_id, _ = traceparent.split("-", 3)
    return {"trace_id": trace_id, "span_id": span_id}
