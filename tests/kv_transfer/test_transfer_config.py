"""What cannot work is refused at start-up, with the field's path."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from core.errors import ConfigError
from kv_transfer.config import TransferConfig
from kv_transfer.transport import wants_nccl

NUMBERS = [f.name for f in dataclasses.fields(TransferConfig) if f.name != "backend"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_every_number_must_be_positive_and_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as failure:
        TransferConfig(**{name: value})  # type: ignore[arg-type]
    assert failure.value.path == f"transfer.{name}"


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ({"silence_timeout_s": 1.0, "keepalive_s": 1.0}, "transfer.silence_timeout_s"),
        ({"coalesce_kib": 1 << 20}, "transfer.coalesce_kib"),
        ({"backend": "mpi"}, "transfer.backend"),
    ],
)
def test_what_contradicts_itself_is_named(wrong: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as failure:
        TransferConfig(**wrong)  # type: ignore[arg-type]
    assert failure.value.path == path


def test_nccl_is_for_gpus_and_never_a_silent_choice() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert wants_nccl("auto", gpu, True)
    assert not wants_nccl("gloo", gpu, True)
    assert not wants_nccl("auto", gpu, False)
    assert not wants_nccl("auto", cpu, True)
    for device, available in ((cpu, True), (gpu, False)):
        with pytest.raises(ConfigError, match=r"^transfer\.backend: "):
            wants_nccl("nccl", device, available)
