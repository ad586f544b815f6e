"""`penstock demo`, as the README's first command runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

FIELDS = {
    "ttft_s", "itl_p50_s", "itl_p99_s", "tokens_per_s", "kv_bytes", "overlap_ratio", "startup_s", "text",
    "prefill_worker", "decode_worker",
}  # fmt: skip


@pytest.mark.timeout(180)
def test_the_demo_prints_one_object_and_leaves_no_process() -> None:
    command = [sys.executable, "-m", "cluster.cli", "demo", "def __init__(self", "--max-tokens", "24", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report.keys() >= FIELDS
    assert (report["prefill_worker"], report["decode_worker"]) == ("prefill-0", "decode-0")
    assert report["kv_bytes"] > 0
    assert report["text"]
