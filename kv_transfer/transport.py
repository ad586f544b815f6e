"""How bytes get from one worker of a pair to the other."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from core.errors import ConfigError, TransferError
from core.messages import Connect
from kv_transfer.config import TransferConfig

SENDER, RECEIVER = 0, 1
"""Ranks of the two workers of a pair."""
_FRAME_TAG, _PAYLOAD_TAG, _ABORT_TAG = range(3)
_WATCHDOG_TIMEOUT = timedelta(days=1)  # of torch's NCCL watchdog, which would end the process: our own comes first

dist: Any = torch.distributed  # its stubs leave out stores and the groups' own calls


class Transport(Protocol):
    """One end of a connected pair, used by one thread at a time. Every failure is a TransferError `pair_down`.

    Messages arrive in order. No call outlasts its `timeout_s`; a call that fails leaves the connection broken.
    """

    payload_device: torch.device
    """Where payload must lie to be sent or received."""

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        """Returns when the [FRAME_BYTES] uint8 CPU tensor may be reused: the peer has begun to take it."""

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None: ...

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        """Returns when the 1-D uint8 tensor on `payload_device` may be reused."""

    def receive_payload(self, payload: Tensor, timeout_s: float) -> None: ...

    def abort(self) -> None:
        """Break the connection. Idempotent, from any thread; calls under way here and at the peer fail at once."""


class Rendezvous(Protocol):
    """Where the two workers of a pair meet."""

    address: str
    """host:port to which the senders of this worker's pairs come."""

    def meet(self, connect: Connect, rank: int) -> Transport:
        """Blocks until the peer has come; TransferError `pair_down` where it does not within `connect_timeout_s`."""

    def close(self) -> None: ...


class GroupRendezvous:
    """Pairs meet in a TCPStore of the receiving worker, and become process groups of two. Thread-safe.

    The store listens on `host` alone. Raises ConfigError where NCCL is asked for and can't be had.
    """

    def __init__(self, host: str, device: torch.device, config: TransferConfig) -> None:
        self._host, self._device, self._timeout_s = host, device, config.connect_timeout_s
        self._nccl = wants_nccl(config.backend, device, hasattr(dist, "ProcessGroupNCCL"))
        with socket.create_server((host, 0), backlog=64) as server:
            port = server.getsockname()[1]
            # the store takes over the socket; by itself it would bind to every address
            self._store = dist.TCPStore(
                host, port, None, True, self._timeout, wait_for_workers=False, master_listen_fd=server.detach()
            )
        self.address = f"{host}:{port}"

    @property
    def _timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def meet(self, connect: Connect, rank: int) -> Transport:
        """Outlasts `connect_timeout_s` where the store's process is stopped: callers keep a deadline of their own."""
        host, _, port = connect.store_address.rpartition(":")
        name = f"pair-{connect.prefill_incarnation}-{connect.decode_incarnation}-{connect.epoch}"
        try:
            socket.create_connection((host, int(port)), self._timeout_s).close()  # says at once where nobody listens
            store = dist.TCPStore(host, int(port), None, False, self._timeout, wait_for_workers=False)
        except (OSError, ValueError, RuntimeError) as error:
            text = f"the store at {connect.store_address} can't be reached: {_line(error)}"
            raise TransferError("pair_down", text) from error
        try:
            return ProcessGroupTransport(
                self._gloo_group(dist.PrefixStore(f"{name}-gloo", store), rank),
                self._nccl_group(dist.PrefixStore(f"{name}-nccl", store), rank) if self._nccl else None,
                1 - rank,
                self._device,
            )
        except RuntimeError as error:
            text = f"the peer did not come within {self._timeout_s:g} s: {_line(error)}"
            raise TransferError("pair_down", text) from error

    def close(self) -> None:
        """Nobody can come any more; groups that stand go on."""
        self._store = None

    def _gloo_group(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self._host)]
        options._timeout = self._timeout
        options._threads = 1
        return dist.ProcessGroupGloo(store, rank, 2, options)

    def _nccl_group(self, store: Any, rank: int) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = _WATCHDOG_TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, 2, options)


class ProcessGroupTransport:
    """Frames over a gloo group of two, payload over the same (CPU) or over an NCCL group beside it (GPU).

    The groups are made without `init_process_group`, so a pair can come and go without touching any other. A call on
    gloo that runs into its timeout breaks the connection: gloo closes the sockets. gloo's own `abort` wakes nobody, so
    ours is a receive that nobody answers, with the shortest timeout.

    The NCCL part follows NCCL's documentation and has not run on GPUs yet. An aborted NCCL call returns as if it had
    succeeded, with a part of the data: checksums tell.
    """

    def __init__(self, gloo: Any, nccl: Any, peer: int, device: torch.device) -> None:
        self._gloo, self._nccl, self._peer, self._device = gloo, nccl, peer, device
        self._aborted = threading.Event()
        self.payload_device = device if nccl is not None else torch.device("cpu")

    def send_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._run(self._gloo.send, frame, _FRAME_TAG, timeout_s)

    def receive_frame(self, frame: Tensor, timeout_s: float) -> None:
        self._run(self._gloo.recv, frame, _FRAME_TAG, timeout_s)

    def send_payload(self, payload: Tensor, timeout_s: float) -> None:
        if self._nccl is None:
            self._run(self._gloo.send, payload, _PAYLOAD_TAG, timeout_s)
        else:
            self._run_nccl(self._nccl.send, payload, timeout_s)

    def receive_payload(self, payload: Tensor, timeout_s: float) -> None:
        if self._nccl is None:
            self._run(self._gloo.recv, payload, _PAYLOAD_TAG, timeout_s)
        else:
            self._run_nccl(self._nccl.recv, payload, timeout_s)

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
        return "the channel was aborted" if self._aborted.is_set() else _line(error)


def wants_nccl(backend: str, device: torch.device, available: bool) -> bool:
    """Whether payload goes over NCCL. Raises ConfigError where it must and can't."""
    possible = device.type == "cuda" and available
    if backend == "nccl" and not possible:
        raise ConfigError("transfer.backend", backend, "needs a CUDA device and a torch build with NCCL; use 'gloo'")
    return possible and backend != "gloo"


def _line(error: Exception) -> str:
    """The first sentence of a C++ error, without its source location."""
    line = str(error).partition("\n")[0]
    line = line.partition("] ")[2] if line.startswith("[") else line
    return line.partition(". ")[0] or type(error).__name__
