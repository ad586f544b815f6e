"""Workers land on the nodes that are meant for them, and find each other across nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MODEL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(200)
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"),
    reason="a network namespace, where Ray's nodes share the address 127.0.0.1, takes root, unshare and ip",
)
def test_each_worker_is_placed_on_a_node_with_the_resource_of_its_role() -> None:
    inside = f"ip link set lo up && exec {sys.executable} -m tests.e2e.two_nodes {MODEL}"
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", inside], capture_output=True, text=True, timeout=180, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "num_tokens": 8,
        "num_nodes": 2,
        "left": {"prefill": 0, "decode": 0},
    }
