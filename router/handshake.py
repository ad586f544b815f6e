"""What router and worker prove to each other at the beginning of a session, and at each registration.

Both ends import this: the two halves of a proof can't drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.secret import Secret


@dataclass(frozen=True, slots=True)
class Handshake:
    """One session's, by its two nonces. Bound to both incarnations: a proof is good for this session only."""

    secret: Secret
    router_incarnation: str
    worker_incarnation: str
    router_nonce: bytes
    worker_nonce: bytes

    @property
    def _parts(self) -> tuple[str | bytes, ...]:
        return self.router_incarnation, self.worker_incarnation, self.router_nonce, self.worker_nonce

    def router_proof(self) -> bytes:
        return self.secret.prove("router", *self._parts)

    def worker_proof(self) -> bytes:
        return self.secret.prove("worker", *self._parts)

    def accepts_router(self, proof: bytes) -> bool:
        return self.secret.accepts(proof, "router", *self._parts)

    def accepts_worker(self, proof: bytes) -> bool:
        return self.secret.accepts(proof, "worker", *self._parts)

    def session_secret(self) -> Secret:
        """Signs the tickets of this session: one of another session is of no use here."""
        return self.secret.derive("session", *self._parts)


def registration_proof(
    secret: Secret, worker_id: str, incarnation: str, address: str, role: str, nonce: bytes
) -> bytes:
    """A worker's. One that is sent again only has the router dial that address, where the worker must prove itself."""
    return secret.prove("register", worker_id, incarnation, address, role, nonce)


def registered_proof(secret: Secret, nonce: bytes, *, connected: bool) -> bytes:
    """The router's answer to it."""
    return secret.prove("registered", nonce, connected)
