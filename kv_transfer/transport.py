"""How bytes get from one worker of a pair to the other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from core.errors import TransferError

SENDER, RECEIVER = 0, 1

dist: Any = torch.distributed  # its stubs leave out stores and the groups' own calls


class Transport(Protocol):
    """A connected pair of two, used by one thread on each side. Every failure is a TransferError `pair_down`."""

    payload_device: torch.device
    """Where payload must lie to be sent or received."""

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        """Returns when the [FRAME_BYTES] uint8 CPU tensor may be reused."""

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None: ...

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        """Returns when the 1-D uint8 tensor on `payload_device` may be reused."""

    def receive_payload(self, payload: Tensor, timeout_s: float) -> None: ...

    def abort(self) -> None:
        """Let go of the connection. From any thread; a call that waits fails, at its timeout at the latest."""


class ProcessGroupTransport:
    """Frames over a gloo group of two, payload over the same (CPU) or over an NCCL group beside it (GPU).

    The groups are made without `init_process_group`, so a pair can come and go without touching any other. After an
    abort NCCL may return from a receive without an error and with a part of the data: the commit record is what tells.
    """

    def __init__(
        self, store: Any, rank: int, *, host: str, device: torch.device, backend: str, timeout_s: float
    ) -> None:
        """Blocks until the peer has joined; `pair_down` at `timeout_s`."""
        self._peer = 1 - rank
        try:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout = timedelta(seconds=timeout_s)
            options._threads = 1
            self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, 2, options)
            self._nccl = _nccl(store, rank, timeout_s) if uses_nccl(device, backend) else None
        except RuntimeError as error:
            raise TransferError("pair_down", f"the peer did not join within {timeout_s:g} s: {_line(error)}") from error
        self.payload_device = device if self._nccl is not None else torch.device("cpu")

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._wait(self._gloo.send([frame], self._peer, 0), timeout_s)

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._wait(self._gloo.recv([frame], self._peer, 0), timeout_s)

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        group = self._nccl or self._gloo
        self._wait(group.send([payload], self._peer, 1), timeout_s)

    def receive_payload(self, payload: Tensor, timeout_s: float) -> None:
        group = self._nccl or self._gloo
        self._wait(group.recv([payload], self._peer, 1), timeout_s)

    def abort(self) -> None:
        self._gloo.abort()
        if self._nccl is not None:
            self._nccl.abort()

    def _wait(self, work: Any, timeout_s: float) -> None:
        try:
            work.wait(timedelta(seconds=timeout_s))
            if self._nccl is not None:
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise TransferError("pair_down", _line(error)) from error


def uses_nccl(device: torch.device, backend: str) -> bool:
    return backend == "nccl" or (backend == "auto" and device.type == "cuda" and hasattr(dist, "ProcessGroupNCCL"))


def _nccl(store: Any, rank: int, timeout_s: float) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, 2, options)


def _line(error: Exception) -> str:
    """The first line of a C++ error without its source location."""
    line = str(error).partition("\n")[0]
    return line.partition("] ")[2] or line or type(error).__name__
