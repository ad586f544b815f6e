"""What a measurement prints and keeps; and how long a cancel may take."""

import json
from pathlib import Path

import pytest

from benchmarks import cancel
from benchmarks.command import run_command
from benchmarks.rows import Row


def measure(quick: bool) -> list[Row]:
    return [Row.of("quick" if quick else "whole", 3.0, "1/s", 1.0, 2.0)]


def test_json_is_the_last_and_only_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--quick", "--json"])
    run_command("x", "What it is.\n\nMore.", measure)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["name"], row["ratio"], row["ok"]) == ("quick", 1.5, True)


def test_results_are_kept_with_date_machine_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--output", str(tmp_path / "x.json")])
    run_command("x", None, measure)
    kept = json.loads((tmp_path / "x.json").read_text())
    assert (kept["command"], kept["rows"][0]["name"]) == ("python -m benchmarks.x", "whole")
    assert kept["date"]
    assert kept["machine"]["cores"] > 0
    assert "ratio 1.500, target 1: ok" in capsys.readouterr().out


def test_a_cancel_is_judged_by_its_99th_percentile() -> None:
    assert cancel.row_of("x", [0.001] * 98 + [0.049] * 2).ok
    assert not cancel.row_of("x", [0.001] * 98 + [0.051] * 2).ok
