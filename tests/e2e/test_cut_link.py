"""Two hosts, and a link between them that is cut in the middle of answers, and restored."""

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


def why_not() -> str:
    """Why this machine can't have a second host; empty where it can."""
    if os.geteuid() != 0:
        return "another network namespace takes root"
    if missing := [name for name in ("unshare", "nsenter", "ip") if not shutil.which(name)]:
        return f"another network namespace takes {', '.join(missing)}"
    probe = "ip link add near type veth peer name far"
    tried = subprocess.run(["unshare", "--net", "sh", "-c", probe], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"the kernel gives no veth: {tried.stderr.strip()}"


@pytest.mark.timeout(200)
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "none")
def test_answers_go_on_without_the_host_that_was_cut_off_and_use_it_when_it_is_back() -> None:
    command = ["unshare", "--net", sys.executable, "-m", "tests.e2e.cut_link", str(MODEL)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["transports"] == {"decode-0": "tcp", "decode-1": "shm"}
    assert (told["during"], told["alone"], told["after"]) == (True, True, True)
    assert 1.0 < told["took_s"] < 30.0, "who was on the far host waits until it is known to be silent"
