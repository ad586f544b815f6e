"""How bytes get from one worker of a pair to the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from core.errors import ConfigError, TransferError
from kv_transfer.frame import FRAME_BYTES

_FRAME_TAG, _PAYLOAD_TAG, _ABORT_TAG = range(3)

dist: Any = torch.distributed  # its stubs leave out stores and the groups' own calls


class Delivery(Protocol):
    """A message on its way."""

    def wait(self, timeout_s: float) -> None:
        """Returns when its memory may be reused; one message after the other, in the order that they were sent."""


class Transport(Protocol):
    """One end of a connected pair. Every failure is a TransferError `pair_down`.

    One thread sends, another waits for deliveries, a third may abort; or one receives. Messages arrive in order. No
    call outlasts its `timeout_s`; one that fails leaves the connection broken.
    """

    name: str
    """What carries the payload."""
    payload_device: torch.device
    """Where payload must lie to be sent, and lies when received."""
    memory: Tensor | None
    """[N] uint8: the sender's, in which its payload must lie; None where any memory will do."""

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
        """Begin to send a [FRAME_BYTES] uint8 CPU tensor, then `parts`: 1-D uint8 tensors on `payload_device`."""

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None: ...

    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        """What came with the frame: [size] uint8 each, or less where less was sent, until the next one is asked for.

        The later ones come while the caller is busy with the ones before.
        """

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
        self._next: tuple[Tensor, Any] | None = None  # the next frame's memory, which gloo may be writing
        self._staging = torch.empty(0, dtype=torch.uint8, device=self.payload_device)

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Delivery:
        works = [self._begin(self._gloo.send, frame, _FRAME_TAG)]
        if self._nccl is None:
            works += [self._begin(self._gloo.send, part, _PAYLOAD_TAG) for part in parts]
        else:
            for part in parts:
                self._run_nccl(self._nccl.send, part, timeout_s)
        return _Works((frame, *parts), works, self._finish)

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        """The frame after the next is asked for already: then the peer can send it while this one's payload is read."""
        if self._next is None:
            self._next = self._ask()
        data, work = self._next
        self._finish(work, timeout_s)
        frame.copy_(data)
        self._next = self._ask()

    def receive_parts(self, sizes: Sequence[int], timeout_s: float) -> Iterator[Tensor]:
        if sum(sizes) > self._staging.numel():
            self._staging = torch.empty(sum(sizes), dtype=torch.uint8, device=self.payload_device)
        parts = torch.split(self._staging[: sum(sizes)], list(sizes))
        if self._nccl is not None:
            for part in parts:
                self._run_nccl(self._nccl.recv, part, timeout_s)
                yield part
            return
        for part, work in [(part, self._begin(self._gloo.recv, part, _PAYLOAD_TAG)) for part in parts]:
            self._finish(work, timeout_s)
            yield part

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

    def _ask(self) -> tuple[Tensor, Any]:
        data = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        return data, self._begin(self._gloo.recv, data, _FRAME_TAG)

    def _begin(self, call: Any, tensor: Tensor, tag: int) -> Any:
        try:
            return call([tensor], self._peer, tag)
        except RuntimeError as error:
            raise TransferError("pair_down", self._reason(error)) from error

    def _finish(self, work: Any, timeout_s: float) -> None:
        try:
            work.wait(timedelta(seconds=timeout_s))
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


@dataclass(frozen=True, slots=True)
class _Works:
    """A frame and its payload, sent by gloo."""

    keep: tuple[Tensor, ...]
    works: list[Any]
    finish: Callable[[Any, float], None]

    def wait(self, timeout_s: float) -> None:
        for work in self.works:
            self.finish(work, timeout_s)


def wants_nccl(backend: str, device: torch.device, available: bool) -> bool:
    """Whether payload goes over NCCL. Raises ConfigError where it must and can't."""
    possible = device.type == "cuda" and available
    if backend == "nccl" and not possible:
        raise ConfigError("transfer.backend", backend, "needs a CUDA device and a torch build with NCCL; use 'tcp'")
    return possible and backend in ("auto", "nccl")


def first_sentence(error: Exception) -> str:
    """The first sentence of a C++ error, without its source location."""
    line = str(error).partition("\n")[0]
    line = line.partition("] ")[2] if line.startswith("[") else line
    return line.partition(". ")[0] or type(error).__name__
