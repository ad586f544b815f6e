"""How fast this machine reads memory and multiplies matrices: what no engine on it can beat.

Reading: sums over a buffer of 512 MiB (128 in a quick run), far larger than a core's caches, each thread over its own
part. Multiplying: [M, K] x [K, N] of the models' shapes with many rows, int8 with int32 sums. Of several ways to do
either the fastest counts, and of all repetitions the best, not the median: a ceiling is what the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import threads
from kernels.linear import make_linear
from kernels.quantize import Precision

BUFFER_BYTES = 512 * 2**20
LIMIT_S = 1.5
"""For the repetitions of one way to do one thing."""
SHAPES = ((2048, 768, 4096), (2048, 2048, 768), (1024, 512, 1024))
"""M, K, N"""
FloatArray = npt.NDArray[np.float32]
Clock = Callable[[], float]
Shape = tuple[int, int, int]
Route = Callable[[int, int, int], Callable[[], object]]
"""From a shape to a run of it."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    read_one_thread_bytes_per_s: float
    read_bytes_per_s: float
    """Of all threads together."""
    float32_flops: float
    float32_route: str
    """What multiplied fastest."""
    int8_flops: float
    int8_route: str

    def flops(self, precision: str) -> float:
        return self.int8_flops if precision == "int8" else self.float32_flops


def measure_ceilings(num_threads: int, *, quick: bool = False, clock: Clock = time.perf_counter) -> Ceilings:
    """Sets the threads of torch and of our kernels for the whole process."""
    repeats, shapes, buffer_bytes = (2, SHAPES[:1], BUFFER_BYTES // 4) if quick else (10, SHAPES, BUFFER_BYTES)
    buffer = np.ones(buffer_bytes // 4, dtype=np.float32)
    one = read_rate(buffer, 1, repeats, clock)
    together = max(one, read_rate(buffer, num_threads, repeats, clock))
    del buffer
    torch.set_num_threads(num_threads)

    def fastest(routes: Mapping[str, Route]) -> tuple[float, str]:
        return max((flop_rate(route, shapes, repeats, clock), name) for name, route in routes.items())

    theirs = {precision: fastest(routes) for precision, routes in TORCH_ROUTES.items()}
    threads.set_num_threads(num_threads)  # only now: where there are C++ kernels, this leaves torch with one thread
    float32, int8 = (max(theirs[precision], fastest({"penstock": _own(precision)})) for precision in PRECISIONS)
    return Ceilings(one, together, *float32, *int8)


def read_rate(buffer: FloatArray, num_threads: int, repeats: int, clock: Clock) -> float:
    """Bytes in a second, the best of `repeats` passes of each way to read."""
    parts = np.array_split(buffer, num_threads)
    tensors = [torch.from_numpy(part) for part in parts]
    with ThreadPoolExecutor(num_threads, initializer=partial(torch.set_num_threads, 1)) as pool:
        passes: list[Callable[[], object]] = [
            lambda: list(pool.map(torch.sum, tensors)),
            lambda: list(pool.map(torch.dot, tensors, tensors)),
            lambda: list(pool.map(np.bitwise_or.reduce, [part.view(np.int32) for part in parts])),
        ]
        return max(buffer.nbytes / best_s(each, repeats, clock) for each in passes)


def read_rate_now(num_threads: int, clock: Clock) -> float:
    """`read_rate` in some tenths of a second."""
    return read_rate(np.ones(BUFFER_BYTES // 8, dtype=np.float32), num_threads, 3, clock)


def flop_rate(route: Route, shapes: Sequence[Shape], repeats: int, clock: Clock) -> float:
    """Multiplications and additions in a second: the best of all shapes."""
    return max(2.0 * m * k * n / best_s(route(m, k, n), repeats, clock) for m, k, n in shapes)


def best_s(run: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Of `repeats` runs, or of as many as LIMIT_S has room for; the first doesn't count."""
    times: list[float] = []
    end_s = clock() + LIMIT_S
    while len(times) < 2 or (len(times) <= repeats and clock() < end_s):
        start_s = clock()
        run()
        times.append(clock() - start_s)
    return min(times[1:])


def _torch_float32(m: int, k: int, n: int) -> Callable[[], object]:
    a, b = torch.randn(m, k), torch.randn(n, k)
    return lambda: torch.mm(a, b.t())


def _torch_int8(m: int, k: int, n: int) -> Callable[[], object]:
    a, b = _codes(m, k), _codes(n, k)
    return lambda: torch._int_mm(a, b.t())


def _onednn_int8(m: int, k: int, n: int) -> Callable[[], object]:
    """With the scales, to float32; the activations are quantised beforehand."""
    a, scales = _codes(m, k).to(torch.uint8), torch.ones(n)
    zeros = torch.zeros(n, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(_codes(n, k), [m, k])
    return lambda: torch.ops.onednn.qlinear_pointwise(
        a, 1.0, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _own(precision: Precision) -> Route:
    """Our own kernel as the engine calls it: float32 in and out, the rounding of activations within."""

    def route(m: int, k: int, n: int) -> Callable[[], object]:
        linear, x = make_linear([torch.randn(n, k)], None, precision), torch.randn(m, k)
        return lambda: linear(x)

    return route


def _codes(rows: int, columns: int) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)


PRECISIONS: tuple[Precision, Precision] = ("float32", "int8")
TORCH_ROUTES: dict[Precision, dict[str, Route]] = {
    "float32": {"torch.mm": _torch_float32},
    "int8": {"torch._int_mm": _torch_int8, "onednn.qlinear_pointwise": _onednn_int8},
}
