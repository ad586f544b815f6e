"""A router as a process. Loads no torch."""

from __future__ import annotations

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 5.0
