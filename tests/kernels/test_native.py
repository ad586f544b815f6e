"""The C++ kernels are built, found again, and done without where they can't be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import native, threads
from kernels.linear import make_linear

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_this_machine_has_them() -> None:
    """Else every test of a kernel would only compare the reference with itself."""
    assert native.cpu_isa() == "none" or native.library() is not None


def test_a_library_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(native, "SOURCES", source_folder(tmp_path, "int one() { return 1; }"))
    first = native.build("g++", "avx2")
    built_at = first.stat().st_mtime_ns
    assert native.build("g++", "avx2") == first
    assert first.stat().st_mtime_ns == built_at
    assert not list(tmp_path.glob("*.tmp"))


def test_a_changed_source_or_header_gives_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path))
    folder = source_folder(tmp_path, "int one() { return 1; }")
    monkeypatch.setattr(native, "SOURCES", folder)
    names = {native.build("g++", "avx2")}
    (folder / "a.cpp").write_text("int one() { return 2; }")
    names.add(native.build("g++", "avx2"))
    (folder / "a.h").write_text("// changed")
    names.add(native.build("g++", "avx2"))
    assert len(names) == 3


def test_without_a_working_compiler_the_reference_runs() -> None:
    done = in_a_process(
        "from kernels import native; print(native.library())", CXX="/bin/false", PENSTOCK_CACHE="/nonexistent"
    )
    assert done.stdout.strip() == "None"
    assert "can't be built" in done.stderr


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    done = in_a_process("from kernels import native; native.cpu_isa()", PENSTOCK_CPU_ISA="sse9")
    assert "PENSTOCK_CPU_ISA: got 'sse9', must be one of" in done.stderr


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_the_pool_takes_any_size_at_any_time(sizes: list[int]) -> None:
    before = threads.num_threads()
    for size in sizes:
        threads.set_num_threads(size)
        assert threads.num_threads() == size
    threads.set_num_threads(before)


def source_folder(tmp_path: Path, code: str) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "a.cpp").write_text(code)
    (folder / "a.h").write_text("// nothing")
    return folder


def test_threads_that_get_no_core_hold_nothing_up() -> None:
    """Far more threads than cores, and loops one behind the other: late helpers must not disturb later loops."""
    layer = make_linear([torch.randn(640, 32)], None, "float32")
    inputs = [torch.randn(n, 32) for n in (1, 3)]
    expected, before = [layer(x) for x in inputs], threads.num_threads()
    threads.set_num_threads(16)
    try:
        for _ in range(2000):
            for x, y in zip(inputs, expected, strict=True):
                assert torch.equal(layer(x), y)
    finally:
        threads.set_num_threads(before)
