"""PENSTOCK_TEST_DEVICE=cuda runs the same tests on a GPU."""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)
    return torch.device(os.environ.get("PENSTOCK_TEST_DEVICE", "cpu"))


@pytest.fixture
def rng(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
