"""A worker tells its routers where it is, again and again, for each of them may have restarted."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable

import grpc

from core.secret import draw_nonce
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.access.network import WorkerNetwork
from router.handshake import registered_proof, registration_proof

log = logging.getLogger(__name__)

REGISTER_INTERVAL_S = 2.0
REGISTER_RETRY_S = 0.2
CHANNEL_OPTIONS = (("grpc.max_reconnect_backoff_ms", 1000),)  # else a router that was away long is found late


class Registrar:
    """`addresses` tells where routers register workers, several of them separated by commas: asked each time, so that a
    router may come back elsewhere. `registration` has all but the proof; `role` is its role's name."""

    def __init__(
        self,
        registration: worker_pb2.RegisterRequest,
        role: str,
        network: WorkerNetwork,
        addresses: Callable[[], str],
    ) -> None:
        self._registration, self._network, self._addresses = registration, network, addresses
        self._nonce = draw_nonce()
        self._channels: dict[str, grpc.Channel] = {}
        if network.secret is not None:
            r = registration
            r.nonce = self._nonce
            r.proof = registration_proof(network.secret, r.worker_id, r.incarnation, r.address, role, self._nonce)

    def run(self, ended: threading.Event) -> None:
        """Until `ended`."""
        wait_s = 0.0
        while not ended.wait(wait_s):
            wait_s = REGISTER_INTERVAL_S if self._register_all() else REGISTER_RETRY_S
        for channel in self._channels.values():
            channel.close()

    def _register_all(self) -> bool:
        """Whether every router has heard."""
        try:
            addresses = self._addresses().split(",")
        except OSError as error:
            log.info("worker %s can't register: %s", self._registration.worker_id, error)
            return False
        for address in self._channels.keys() - set(addresses):
            self._channels.pop(address).close()
        heard = [self._register(address) for address in addresses]
        return all(heard)

    def _register(self, address: str) -> bool:
        secret = self._network.secret
        if address not in self._channels:
            self._channels[address] = self._network.dial(address, CHANNEL_OPTIONS)
        try:
            stub = worker_pb2_grpc.RegistryStub(self._channels[address])
            answer = stub.Register(self._registration, timeout=REGISTER_INTERVAL_S)
            if secret is not None:
                proof = registered_proof(secret, self._nonce, connected=answer.connected)
                if not hmac.compare_digest(answer.proof, proof):
                    raise ConnectionError("who answers there does not have the cluster's secret")
        except (grpc.RpcError, OSError) as error:
            log.info("worker %s can't register with %s: %s", self._registration.worker_id, address, error)
            return False
        return True
