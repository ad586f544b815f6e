"""`python -m benchmarks.NAME [--quick] [--json] [--output FILE]`, for measurements that end in rows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.rows import Row


def run_command(name: str, description: str | None, measure: Callable[[bool], Sequence[Row]]) -> None:
    """`measure(quick)` makes the rows. With --json all that is printed is one object, {"rows": [...]}."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: within 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help=f"a file for the results, as {name}.json in benchmarks/results")
    arguments = parser.parse_args()
    rows = [asdict(row) for row in measure(arguments.quick)]
    if arguments.output is not None:
        command = f"python -m benchmarks.{name}{' --quick' if arguments.quick else ''}"
        result = {"command": command, "date": date.today().isoformat(), "machine": machine(), "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        peer = "" if row["peer"] is None else f"peer {row['peer']:,.4g}, ratio {row['ratio']:.3f}, "
        verdict = "ok" if row["ok"] else "missed"
        print(f"{row['name']:48} {row['value']:>10,.4g} {row['unit']:9} {peer}target {row['target']:.3g}: {verdict}")
        if row["detail"]:
            print(f"    {row['detail']}")
