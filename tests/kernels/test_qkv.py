"""Split, norm, rotation and cache write of a step's Q, K and V."""

import math

import pytest
import torch

from kernels.paged_kv import empty_kv, token_views
from kernels.qkv import QKVWrite
from kernels.quantize import quantize_rows

EPS = 1e-5
SLOTS = [11, 0, 4, 3, 10]
POSITIONS = [0, 5, 900, 3, 70]


@pytest.fixture(params=["chosen", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine chooses, and what runs where there is no compiler."""
    if request.param == "reference":
        monkeypatch.setattr("kernels.qkv.function", lambda *_: None)


def normed(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """x: [T, N, D], in float64."""
    if weight is None:
        return x
    if len(weight) == x.shape[-1]:
        return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight
    flat = x.flatten(1)
    return (flat / (flat.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight).view(x.shape)


def rotated(x: torch.Tensor, frequencies: list[float]) -> torch.Tensor:
    """x: [T, N, D]; pair by pair."""
    out, half = x.clone(), len(frequencies)
    for t, position in enumerate(POSITIONS):
        for i, frequency in enumerate(frequencies):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            out[t, :, i] = x[t, :, i] * c - x[t, :, i + half] * s
            out[t, :, i + half] = x[t, :, i + half] * c + x[t, :, i] * s
    return out


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("norm", ["none", "head", "full"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "num_rotated", "block_size"),
    [(4, 2, 16, 16, 4), (6, 1, 10, 4, 3), (3, 3, 34, 34, 16), (2, 1, 64, 0, 16), (8, 2, 24, 18, 32)],
)
def test_q_is_returned_and_k_and_v_stand_in_their_slots(
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    num_rotated: int,
    block_size: int,
    norm: str,
    dtype: torch.dtype,
    device: torch.device,
    rng: torch.Generator,
) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    kv = empty_kv(4, num_kv_heads, head_size, block_size, dtype, device)
    qkv = random(5, (num_heads + 2 * num_kv_heads) * head_size)
    frequencies = [0.7 ** (i + 1) for i in range(num_rotated // 2)]
    angles = torch.tensor(POSITIONS, dtype=torch.float64).unsqueeze(1) * torch.tensor(frequencies, dtype=torch.float64)
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    widths = {"none": None, "head": (1, 1), "full": (num_heads, num_kv_heads)}[norm]
    q_norm, k_norm = (None, None) if widths is None else (random(n * head_size) for n in widths)
    write = QKVWrite(q_norm, k_norm, EPS, num_heads, num_kv_heads)
    q = write(qkv, kv, torch.tensor(SLOTS, device=device), cos, sin)
    wide = qkv.double().cpu().view(5, -1, head_size)
    split = torch.split(wide, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = [None if w is None else w.double().cpu() for w in (q_norm, k_norm)]
    q_expected, k_expected = (rotated(normed(x, w), frequencies) for x, w in zip(split, weights, strict=False))
    torch.testing.assert_close(q.double().cpu(), q_expected, rtol=1e-5, atol=1e-5)
    stored = [view.flatten(0, 1).cpu() for view in token_views(kv)]
    untouched = [slot for slot in range(4 * block_size) if slot not in SLOTS]
    for part, values in zip(stored[:2], (k_expected, split[2]), strict=True):
        assert not part[untouched].any()
        scales = stored[2 if part is stored[0] else 3][SLOTS].unsqueeze(-1) if dtype is torch.int8 else 1.0
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.int8: 0.0}[dtype]
        difference = (part[SLOTS].double() * scales - values).abs()
        allowed = 0.501 * scales if dtype is torch.int8 else tolerance * (values.abs() + 1)
        assert bool((difference <= allowed).all())


def test_int8_rows_use_all_codes_and_round_half_to_even() -> None:
    codes, scales = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.5, 0.25, 0.0]]))
    assert codes.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0], [-127, 64, 32, 0]]
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.0, 1 / 127]))
