"""The router's end of worker.proto: sessions dialled to workers, and the registry served to them.

Here and in `rpc_commands`, `rpc_events` generated wire types end; everything else sees `core.messages`.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc.aio

from core.errors import InvalidRequestError, PenstockError, UnauthenticatedError
from core.messages import Command, RouterHello, WorkerRole
from core.secret import Secret
from penstock.v1 import worker_pb2, worker_pb2_grpc
from router.access.network import WorkerNetwork
from router.errors import aborting
from router.handshake import registered_proof, registration_proof
from router.rpc_commands import command_to_wire
from router.rpc_events import WireError, WorkerMessage, message_from_wire, role_from_wire
from router.rpc_handlers import Context, add_service, readable

REGISTRY = "penstock.v1.Registry"
MAX_MESSAGE_BYTES = 64 * 2**20
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),  # a new dial must not inherit the connection backoff of the last one
    ("grpc.enable_http_proxy", 0),
)


class SessionLostError(PenstockError):
    """The stream to a worker broke, or could not be opened; `str()` says why."""


class WorkerCall:
    """The raw session stream: typed messages in and out, every wire failure a `SessionLostError` or `WireError`."""

    def __init__(self, address: str, network: WorkerNetwork) -> None:
        self._channel = network.dial_aio(address, CHANNEL_OPTIONS)
        self._signer: Secret | None = None
        self._call: Any = worker_pb2_grpc.WorkerStub(self._channel).Session()

    async def say_hello(self, hello: RouterHello) -> None:
        wire = worker_pb2.RouterHello(
            wire_version=hello.wire_version,
            router_id=hello.router_id,
            incarnation=hello.incarnation,
            nonce=hello.nonce,
        )
        await self._write(worker_pb2.RouterMessage(hello=wire))

    async def prove(self, proof: bytes, signer: Secret) -> None:
        """Answer the worker's challenge; from now on tickets are signed."""
        self._signer = signer
        await self._write(worker_pb2.RouterMessage(proof=proof))

    async def write(self, commands: Sequence[Command]) -> None:
        wire = [command_to_wire(command, self._signer) for command in commands]
        await self._write(worker_pb2.RouterMessage(commands=wire))

    async def read(self) -> WorkerMessage:
        try:
            message = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise SessionLostError(describe(error)) from error
        if message is grpc.aio.EOF:
            raise SessionLostError("the worker ended the session")
        return message_from_wire(message)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    async def _write(self, message: worker_pb2.RouterMessage) -> None:
        try:
            await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise SessionLostError(describe(error)) from error


def describe(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return "the stream was closed"


@dataclass(frozen=True, slots=True)
class Registration:
    """A worker says where it can be reached."""

    worker_id: str
    incarnation: str
    address: str
    role: WorkerRole


def add_registry(
    server: grpc.aio.Server, register: Callable[[Registration], bool], secret: Secret | None = None
) -> None:
    """Hands registrations to `register`, which says whether that incarnation is connected. A worker of a later version
    may say more than is known here. With a `secret`, only workers that prove to have it are heard."""

    async def answer(
        received: worker_pb2.RegisterRequest | InvalidRequestError, context: Context
    ) -> worker_pb2.RegisterResponse:
        async with aborting(context):
            request = readable(received)
            role = role_from_wire(request.role)
            registration = Registration(request.worker_id, request.incarnation, request.address, role)
            if secret is None:
                return worker_pb2.RegisterResponse(connected=register(registration))
            parts = registration.worker_id, registration.incarnation, registration.address, role.value, request.nonce
            if not hmac.compare_digest(request.proof, registration_proof(secret, *parts)):
                raise UnauthenticatedError("the worker does not prove that it has the cluster's secret")
            connected = register(registration)
            proof = registered_proof(secret, request.nonce, connected=connected)
            return worker_pb2.RegisterResponse(connected=connected, proof=proof)

    add_service(server, REGISTRY, {"Register": (answer, worker_pb2.RegisterRequest)}, known_only=False)


__all__ = ["Registration", "SessionLostError", "WireError", "WorkerCall", "WorkerMessage", "add_registry"]
