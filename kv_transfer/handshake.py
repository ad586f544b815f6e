"""What the two sides of a pair tell each other before they choose what carries their payload. Pure."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from core.errors import TransferError

PROTOCOL = 4
"""Of the handshake and of the frames that follow."""
INCOMPATIBLE = "incompatible"
"""Reason of a TransferError that no further try will mend."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one side can do. `host` and `gpu` are empty where it can't share memory, or won't use NCCL."""

    backend: str
    """As configured: auto, or what it insists on."""
    device: str
    """Type of the device that holds its KV."""
    host: str
    """Equal only for workers that may share memory: of one machine, network namespace and user."""
    gpu: str
    """Names its GPU among those of all machines."""
    protocol: int = PROTOCOL

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, data: bytes) -> Offer:
        """Raises TransferError `incompatible` where it is none, or one of another version."""
        try:
            values = json.loads(data)
            protocol = values["protocol"]
            if protocol != PROTOCOL:
                raise TransferError(
                    INCOMPATIBLE, f"the peer speaks version {protocol} of the pairs, this is {PROTOCOL}"
                )
            return cls(**{f.name: values[f.name] for f in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise TransferError(INCOMPATIBLE, "the peer's offer can't be read") from error


def choose(sender: Offer, receiver: Offer) -> str:
    """What carries the payload: "shm", "nccl", "tcp" or "gloo". Both sides come to the same answer.

    Raises TransferError `incompatible`, which says why, where one insists on what can't be.
    """
    obstacles = {"shm": _no_shm(sender, receiver), "nccl": _no_nccl(sender, receiver), "tcp": "", "gloo": ""}
    wanted = {offer.backend for offer in (sender, receiver)} - {"auto"}
    if len(wanted) > 1:
        text = f"transfer.backend is {sender.backend} on the sender's side and {receiver.backend} on the receiver's"
        raise TransferError(INCOMPATIBLE, text)
    for backend in wanted:
        if obstacles[backend]:
            raise TransferError(INCOMPATIBLE, f"transfer.backend is {backend}, but {obstacles[backend]}")
        return backend
    return next(backend for backend, obstacle in obstacles.items() if not obstacle)


def _no_shm(sender: Offer, receiver: Offer) -> str:
    if (sender.device, receiver.device) != ("cpu", "cpu"):
        return f"KV is on {sender.device} and {receiver.device}: only workers on CPU share memory"
    if not (sender.host and receiver.host):
        return "one of the two can't share memory"
    return "" if sender.host == receiver.host else "the two are not on one host, in one network namespace, of one user"


def _no_nccl(sender: Offer, receiver: Offer) -> str:
    if not (sender.gpu and receiver.gpu):
        return "the two do not have a GPU each"
    return "both use the same GPU" if sender.gpu == receiver.gpu else ""
