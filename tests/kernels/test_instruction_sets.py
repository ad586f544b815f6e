"""The tests of the kernels again, on the other instruction sets of this CPU, and on the torch reference alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "attention_invariance",
    "checksum",
    "elementwise",
    "experts",
    "kv_wire",
    "linear",
    "mla",
    "moe",
    "paged_attention",
    "qkv",
    "sampling",
)


@pytest.mark.timeout(300)  # a build of the kernels, and a minute of tests
@pytest.mark.parametrize("isa", ["avx512", "avx2", "none"])
def test_kernels(isa: str) -> None:
    if isa not in native.offered_isas() or isa == native.cpu_isa():
        pytest.skip(f"{isa}: this CPU lacks it, or all tests run on it anyway")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [f"tests/kernels/test_{name}.py" for name in TESTS],
        env={**os.environ, native.ISA_VARIABLE: isa, "PENSTOCK_TEST_DEVICE": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert done.returncode == 0, done.stdout[-3000:]
