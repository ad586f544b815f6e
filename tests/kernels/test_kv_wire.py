"""Rounding K and V for the wire: within half a step, each vector by itself, the same by kernel and reference."""

from collections.abc import Iterator

import pytest
import torch

from kernels.kv_wire import round_kv, widen_kv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFERENCE = "kernels.kv_wire.function"


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What this machine chooses, and what runs where there is no compiler."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "reference":
            monkeypatch.setattr(REFERENCE, lambda *_: None)
        yield


def vectors(num: int, head_size: int, dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> torch.Tensor:
    """[num, D] of very different sizes, one of them zero."""
    x = torch.randn(num, head_size, device=device, generator=rng)
    x *= torch.logspace(-4, 3, num, device=device).unsqueeze(1)
    x[num // 2] = 0
    return x.to(dtype)


def rounded(x: torch.Tensor) -> torch.Tensor:
    return round_kv(x.flatten().view(torch.uint8), x.dtype, x.shape[1])


def there_and_back(x: torch.Tensor) -> torch.Tensor:
    return widen_kv(rounded(x), x.dtype, x.shape[1]).view(x.dtype).view(x.shape)


@pytest.mark.parametrize("head_size", [2, 18, 64, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_value_is_within_half_a_step_of_its_vector(
    dtype: torch.dtype, head_size: int, device: torch.device, rng: torch.Generator
) -> None:
    x = vectors(150, head_size, dtype, device, rng)
    step = x.float().abs().amax(dim=1, keepdim=True) / 127
    own = torch.finfo(dtype).eps * x.float().abs()  # of the last rounding, to `dtype`
    floor = 1e-7 if dtype is torch.float16 else 0.0  # its smallest number
    assert ((there_and_back(x).float() - x.float()).abs() <= 0.5001 * step + own + floor).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vector_depends_on_no_other(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    x = vectors(130, 18, dtype, device, rng)
    alone = torch.cat([there_and_back(x[i : i + 2]) for i in range(0, 130, 2)])
    assert torch.equal(there_and_back(x), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_makes_what_the_reference_makes(
    dtype: torch.dtype, device: torch.device, rng: torch.Generator
) -> None:
    x = vectors(150, 80, dtype, device, rng)
    chosen, back = rounded(x), there_and_back(x)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(REFERENCE, lambda *_: None)
        assert torch.equal(rounded(x), chosen)
        assert torch.equal(there_and_back(x), back)


def test_codes_come_first_and_a_float_for_each_vector_after_them(device: torch.device) -> None:
    x = torch.tensor([[127.0, -2.0], [0.5, 0.25]], device=device)
    data = rounded(x)
    assert data[:4].view(torch.int8).tolist() == [127, -2, 127, 64]
    assert data[4:].view(torch.float32).tolist() == [1.0, pytest.approx(0.5 / 127)]


def test_no_vector_is_no_byte(device: torch.device) -> None:
    assert there_and_back(torch.zeros(0, 8, device=device)).shape == (0, 8)
