"""The C++ kernels in `csrc/`: built on first use for the CPU at hand, kept in a cache, loaded once a process.

The library has a plain C interface and knows nothing of torch. Where there is no compiler, or the CPU has no AVX2,
`library()` is None, and the torch reference of every operation runs.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
ISA_VARIABLE = "PENSTOCK_CPU_ISA"
"""avx512_vnni, avx512 or avx2 instead of the best that the CPU has; none for the torch reference."""
CACHE_VARIABLE = "PENSTOCK_CACHE"

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_FLAGS = {"avx512_vnni": (*_AVX512, "-mavx512vnni"), "avx512": _AVX512, "avx2": _AVX2}
"""Best first."""
_COMMON = ("-std=c++20", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
_BUILD_TIMEOUT_S = 300
_ARGUMENTS: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int32,
    "q": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


def offered_isas() -> list[str]:
    """What PENSTOCK_CPU_ISA may be on this CPU, best first."""
    return [*(isa for isa, flags in _FLAGS.items() if _features(flags) <= _cpu_features()), "none"]


def cpu_isa() -> str:
    """The instruction set that the kernels are built for: a key of `_FLAGS`, or "none".

    `ValueError` where PENSTOCK_CPU_ISA names one that does not exist or that this CPU lacks.
    """
    offered = offered_isas()
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted is None:
        return offered[0]
    if wanted not in offered:
        raise ValueError(f"{ISA_VARIABLE}: got {wanted!r}, must be one of {', '.join(offered)} on this CPU")
    return wanted


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they can't be had. A failed build is logged with the compiler's words."""
    isa = cpu_isa()
    if isa == "none":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        log.warning("no C++ compiler found (g++ or clang++, or set CXX): the slow torch kernels run instead")
        return None
    try:
        return ctypes.CDLL(str(build(compiler, isa)))
    except subprocess.CalledProcessError as error:
        log.warning("the C++ kernels can't be built, the slow torch kernels run instead:\n%s", error.stderr[-2000:])
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the C++ kernels can't be built or loaded, the slow torch kernels run instead: %s", error)
    return None


@cache
def function(name: str, arguments: str) -> Callable[..., Any] | None:
    """A function of the library that takes `arguments`, a letter each; None where there is no library.

    p pointer (an address, or None), i int32, q int64, f float, d double. It returns an int32, if anything.
    """
    native = library()
    if native is None:
        return None
    found = native[name]  # an object of its own: its argument types are this caller's
    found.argtypes = [_ARGUMENTS[letter] for letter in arguments]
    return found


def native_function(name: str, arguments: str) -> Callable[..., Any]:
    """`function`, where the caller knows that there is a library."""
    found = function(name, arguments)
    assert found is not None, f"{name} without the library"
    return found


def build(compiler: str, isa: str) -> Path:
    """Path of the built library. Objects and library are named by a hash of all that they are made from."""
    flags = (*_COMMON, *_FLAGS[isa])
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h")))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    common = hashlib.sha256(repr(flags).encode() + version + headers)
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    objects = {}
    for source in sorted(SOURCES.glob("*.cpp")):
        digest = common.copy()
        digest.update(source.read_bytes())
        objects[folder / f"{source.stem}-{digest.hexdigest()[:24]}.o"] = source
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:24]
    target = folder / f"penstock-{isa}-{name}.so"
    if target.exists():
        return target
    with (folder / "lock").open("w") as lock:  # several workers of a host start at once: one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [(source, out) for out, source in objects.items() if not out.exists()]
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)))) as threads:
            list(threads.map(lambda job: _make([compiler, *flags, "-c", str(job[0])], job[1]), missing))
        if not target.exists():
            _make([compiler, "-shared", "-pthread", *map(str, objects)], target)
    return target


def cache_folder() -> Path:
    """$PENSTOCK_CACHE, else penstock/ in $XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get(CACHE_VARIABLE):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "penstock"


def _make(command: list[str], out: Path) -> None:
    """Run a compiler; what it makes appears under its name only when it is whole."""
    unfinished = out.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run(
        [*command, "-o", str(unfinished)], capture_output=True, text=True, check=True, timeout=_BUILD_TIMEOUT_S
    )
    unfinished.replace(out)


def _features(flags: tuple[str, ...]) -> set[str]:
    names = {flag.removeprefix("-m") for flag in flags if not flag.startswith("-mprefer")}
    return {"avx512_vnni" if name == "avx512vnni" else name for name in names}


@cache
def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))
