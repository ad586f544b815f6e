"""The whole benchmark, short, on the embedded model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(180)
def test_a_quick_run_without_peers_ends_with_one_object_of_rows(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PENSTOCK_PEERS"}
    paths = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    command = ["-m", "benchmarks.engine", "--quick", "--json", "--limit-s", "150"]
    done = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "result.json")],
        env={**environment, "PYTHONPATH": paths},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    summary = json.loads(done.stdout)
    rows = {row["name"]: row for row in summary["rows"]}
    assert rows["penstock-tiny, decode, batch 1, one core"]["target"] == 800
    assert rows["penstock-tiny, decode, batch 1, speculation by ngram"]["peer"] > 0
    beside = rows["penstock-tiny, decode, batch 8, fp32 by transformers fp32"]
    assert beside["ratio"] == beside["value"] / beside["peer"]
    assert any("PENSTOCK_PEERS" in each["reason"] for each in summary["missing"])
    file = json.loads((tmp_path / "result.json").read_text())
    assert file["rows"] == summary["rows"]
    assert file["machine"]["cores"] >= 1
    assert file["ceilings"]["read_bytes_per_s"] > 0
    agreement = file["models"]["penstock-tiny"]["agreement"]["fp32 and transformers fp32"]
    assert agreement == "10 of 10 sequences alike"
