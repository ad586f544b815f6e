"""What the router costs: how long it takes to decide where a request goes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.router_placement import placement_rows
from benchmarks.rows import Row

RESULTS = Path(__file__).parent / "results" / "router.json"


def run(*, quick: bool) -> list[Row]:
    """All rows; each group comes from a function of its own."""
    return placement_rows(2_000 if quick else 6_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions: within a minute")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", type=Path, help=f"a file for the results, as {RESULTS.name}")
    arguments = parser.parse_args()
    rows = [asdict(row) for row in run(quick=arguments.quick)]
    if arguments.output is not None:
        command = f"python -m benchmarks.router{' --quick' if arguments.quick else ''}"
        result = {"command": command, "date": date.today().isoformat(), "machine": machine(), "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        verdict = "ok" if row["ok"] else "missed"
        print(f"{row['name']:48} {row['value']:>10,.4g} {row['unit']:9} target {row['target']:.3g}: {verdict}")
        if row["detail"]:
            print(f"    {row['detail']}")


if __name__ == "__main__":
    main()
