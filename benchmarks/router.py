"""What the router costs: how long it takes to decide where a request goes."""

from __future__ import annotations

from benchmarks.command import run_command
from benchmarks.router_placement import placement_rows
from benchmarks.rows import Row


def run(quick: bool) -> list[Row]:
    """All rows; each group comes from a function of its own."""
    return placement_rows(2_000 if quick else 6_000)


if __name__ == "__main__":
    run_command("router", __doc__, run)
