"""The first words of a meeting: both sides prove that the router has told them the secret of the pair."""

from __future__ import annotations

import socket

from core.errors import TransferError
from core.secret import NONCE_BYTES, Secret, draw_nonce
from kv_transfer.pair_store import receive_exactly

PROOF_BYTES = 32


def prove_both(connection: socket.socket, secret: Secret, *, visits: bool, timeout_s: float) -> None:
    """The visitor proves itself first; nothing else is read or said before. `visits`: this side is the visitor.

    Raises TransferError `pair_down` where the peer can't, OSError where it goes away or says nothing in time.
    """
    connection.settimeout(timeout_s)
    ours = draw_nonce()
    connection.sendall(ours)
    theirs = receive_exactly(connection, NONCE_BYTES)
    nonces = (ours, theirs) if visits else (theirs, ours)
    if visits:
        connection.sendall(secret.prove("visitor", *nonces))
    proof = receive_exactly(connection, PROOF_BYTES)
    if not secret.accepts(proof, "host" if visits else "visitor", *nonces):
        raise TransferError("pair_down", "the peer does not prove that it is of the pair")
    if not visits:
        connection.sendall(secret.prove("host", *nonces))
