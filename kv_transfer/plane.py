"""The KV plane of one worker: pairs, sender and receiver together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from core.clock import Clock
from core.messages import Connect
from core.ticket import AttemptKey
from engine.kv_storage import KVStorage
from kv_transfer.config import TransferConfig
from kv_transfer.events import Notify
from kv_transfer.frame import Entry
from kv_transfer.pairs import PairKey, Pairs
from kv_transfer.receiver import KVReceiver
from kv_transfer.rendezvous import GroupRendezvous, Rendezvous
from kv_transfer.reshard import Group, ReshardPlan
from kv_transfer.sender import KVSender


class KVPlane:
    """Owns all channels of a worker. Thread-safe, save for what `KVSender` keeps for the engine thread.

    `notify` is called from threads of the plane. `close` ends them. Raises ConfigError where `config.backend` can't be
    had on the storage's device.
    """

    def __init__(
        self,
        incarnation: str,
        storage: KVStorage,
        host: str,
        config: TransferConfig,
        clock: Clock,
        notify: Notify,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        rendezvous = rendezvous or GroupRendezvous(host, storage.device, config)
        self._pairs = Pairs(incarnation, storage.layout, rendezvous, config, clock, notify, self)
        plan = ReshardPlan(Group(storage.layout), Group(storage.layout))  # of all pairs: only block sizes may differ
        self.sender = KVSender(self._pairs, storage, plan, config, clock, notify)
        self.receiver = KVReceiver(self._pairs, storage, plan, config, clock, notify)

    @property
    def address(self) -> str:
        """Where the senders of pairs meet this worker."""
        return self._pairs.address

    def connect(self, connect: Connect) -> None:
        self._pairs.connect(connect)

    def disconnect(self, pair: PairKey, epoch: int) -> None:
        self._pairs.disconnect(pair, epoch)

    def cancel(self, key: AttemptKey) -> None:
        """Stop what leaves and discard what comes, at once. The halves release it and free the blocks."""
        self.sender.cancel(key)
        self.receiver.cancel(key)

    def renew(self, transfer_ids: Iterable[str], now: float) -> None:
        wanted = set(transfer_ids)
        self.sender.renew(wanted, now)
        self.receiver.renew(wanted, now)

    def expired(self, now: float) -> list[tuple[AttemptKey, str]]:
        """Attempts that nobody wants any more, or that stand still, with the reason; told again if not released."""
        return self.sender.expired(now) + self.receiver.expired(now)

    def close(self) -> None:
        self._pairs.close()

    def check_integrity(self) -> None:
        """Raises IntegrityError where something is held for an attempt that is gone."""
        self.sender.check_integrity()
        self.receiver.check_integrity()

    def on_sent(self, key: AttemptKey, num_bytes: int, seconds: float, at: float) -> None:
        self.sender.on_sent(key, num_bytes, seconds, at)

    def on_segment(self, entry: Entry, payload: Tensor) -> None:
        self.receiver.on_segment(entry, payload)

    def on_pair_down(self, pair: PairKey, epoch: int, reason: str) -> None:
        self.sender.on_pair_down(pair, epoch, reason)
        self.receiver.on_pair_down(pair, epoch, reason)
