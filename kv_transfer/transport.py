"""How bytes get from one worker of a pair to the other."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from core.errors import ConfigError, TransferError

_FRAME_TAG, _PAYLOAD_TAG, _ABORT_TAG = range(3)

dist: Any = torch.distributed  # its stubs leave out stores and the groups' own calls


class Transport(Protocol):
    """One end of a connected pair, used by one thread at a time. Every failure is a TransferError `pair_down`.

    Messages arrive in order. No call outlasts its `timeout_s`; a call that fails leaves the connection broken.
    """

    name: str
    """What carries the payload."""
    payload_device: torch.device
    """Where payload must lie to be sent, and lies when received."""
    memory: Tensor | None
    """[N] uint8: the sender's, to stage payload in that then leaves without a copy; None where any memory will do."""

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        """Returns when the [FRAME_BYTES] uint8 CPU tensor may be reused, the peer having taken the one before it."""

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None: ...

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        """Returns when the 1-D uint8 tensor on `payload_device` may be reused."""

    def receive_payload(self, num_bytes: int, timeout_s: float) -> Tensor:
        """[num_bytes] uint8, to be read until the next call."""

    def abort(self) -> None:
        """Break the connection. Idempotent, from any thread; calls under way here and at the peer fail at once."""


class ProcessGroupTransport:
    """Frames over a gloo group of two, payload over the same (CPU) or over an NCCL group beside it (GPU).

    The groups are made without `init_process_group`, so a pair can come and go without touching any other. A call on
    gloo that runs into its timeout breaks the connection: gloo closes the sockets. gloo's own `abort` wakes nobody, so
    ours is a receive that nobody answers, with the shortest timeout.

    The NCCL part follows NCCL's documentation and has not run on GPUs yet. An aborted NCCL call returns as if it had
    succeeded, with a part of the data: checksums tell.
    """

    def __init__(self, gloo: Any, nccl: Any, peer: int, device: torch.device, keep: object = None) -> None:
        """`gloo` and `nccl` are process groups of two; without `nccl` payload goes over gloo. `keep` lives as long."""
        self._gloo, self._nccl, self._peer, self._device, self._keep = gloo, nccl, peer, device, keep
        self._aborted = threading.Event()
        self.name = "gloo" if nccl is None else "nccl"
        self.payload_device = device if nccl is not None else torch.device("cpu")
        self.memory: Tensor | None = None
        self._staging = torch.empty(0, dtype=torch.uint8, device=self.payload_device)

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._run(self._gloo.send, frame, _FRAME_TAG, timeout_s)

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._run(self._gloo.recv, frame, _FRAME_TAG, timeout_s)

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        if self._nccl is None:
            self._run(self._gloo.send, payload, _PAYLOAD_TAG, timeout_s)
        else:
            self._run_nccl(self._nccl.send, payload, timeout_s)

    def receive_payload(self, num_bytes: int, timeout_s: float) -> Tensor:
        if num_bytes > self._staging.numel():
            self._staging = torch.empty(num_bytes, dtype=torch.uint8, device=self.payload_device)
        payload = self._staging[:num_bytes]
        if self._nccl is None:
            self._run(self._gloo.recv, payload, _PAYLOAD_TAG, timeout_s)
        else:
            self._run_nccl(self._nccl.recv, payload, timeout_s)
        return payload

    def abort(self) -> None:
        if self._aborted.is_set():
            return
        self._aborted.set()
        if self._nccl is not None:
            self._nccl.abort()
        try:
            self._gloo.recv([torch.empty(1)], self._peer, _ABORT_TAG).wait(timedelta(milliseconds=1))
        except RuntimeError:
            return  # as meant: the sockets are closed, now or before

    def _run(self, call: Any, tensor: Tensor, tag: int, timeout_s: float) -> None:
        try:
            call([tensor], self._peer, tag).wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TransferError("pair_down", self._reason(error)) from error

    def _run_nccl(self, call: Any, tensor: Tensor, timeout_s: float) -> None:
        """Waits for the device, since `wait` alone only orders streams; an alarm aborts what takes too long."""
        alarm = threading.Timer(timeout_s, self.abort)
        alarm.daemon = True
        alarm.start()
        try:
            with torch.cuda.device(self._device):
                call([tensor], self._peer, _PAYLOAD_TAG).wait()
                torch.cuda.current_stream().synchronize()
        except RuntimeError as error:
            raise TransferError("pair_down", self._reason(error)) from error
        finally:
            alarm.cancel()
        if self._aborted.is_set():
            raise TransferError("pair_down", "the channel was aborted")

    def _reason(self, error: Exception) -> str:
        return "the channel was aborted" if self._aborted.is_set() else first_sentence(error)


def wants_nccl(backend: str, device: torch.device, available: bool) -> bool:
    """Whether payload goes over NCCL. Raises ConfigError where it must and can't."""
    possible = device.type == "cuda" and available
    if backend == "nccl" and not possible:
        raise ConfigError("transfer.backend", backend, "needs a CUDA device and a torch build with NCCL; use 'gloo'")
    return possible and backend in ("auto", "nccl")


def first_sentence(error: Exception) -> str:
    """The first sentence of a C++ error, without its source location."""
    line = str(error).partition("\n")[0]
    line = line.partition("] ")[2] if line.startswith("[") else line
    return line.partition(". ")[0] or type(error).__name__
