"""The guards of the two front doors: no call gets past them without the key it needs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from core.errors import PenstockError
from router.access.access import CALLER, Access
from router.errors import aborting, http_error
from router.openai_stream import to_json

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})
"""For load balancers and scrapers: they tell nothing of requests."""
OPEN_SERVICES = frozenset({"grpc.health.v1.Health", "penstock.v1.Registry"})
"""Health as above; the Registry is for workers, who have a secret of their own."""
ADMIN_SERVICES = frozenset({"penstock.v1.Admin"})
COUNTED_METHODS = frozenset({"Generate", "GenerateBatch", "Tokenize", "Detokenize"})
"""Calls that make work, and so are requests of a quota; in HTTP it is every POST."""


class HttpGuard:
    """In front of the HTTP API. Answers 401, 403 and 429 itself."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or _is_preflight(scope):
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization")
        try:
            text = given.decode("latin-1") if given else None
            caller = self._access.enter(text, counts=scope["method"] == "POST", admin=False)
        except PenstockError as error:
            told = http_error(error)
            answer = Response(to_json(told.body), told.status, dict(told.headers), media_type="application/json")
            await answer(scope, receive, send)
            return
        CALLER.set(caller)  # of this call's own task
        await self._app(scope, receive, send)


class GrpcGuard(grpc.aio.ServerInterceptor):
    """In front of every gRPC service of the router."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        service, _, method = handler_call_details.method.lstrip("/").rpartition("/")
        if service in OPEN_SERVICES:
            return await continuation(handler_call_details)
        metadata: dict[str, Any] = dict(handler_call_details.invocation_metadata or ())
        given = metadata.get("authorization")
        try:
            caller = self._access.enter(
                given if isinstance(given, str) else None,
                counts=method in COUNTED_METHODS,
                admin=service in ADMIN_SERVICES,
            )
        except PenstockError as error:
            return _refusing(error)
        CALLER.set(caller)  # of this call's own task
        return await continuation(handler_call_details)


def _is_preflight(scope: Scope) -> bool:
    """Browsers ask without a key whether a page may ask at all."""
    return bool(scope["method"] == "OPTIONS")


def _refusing(error: PenstockError) -> Any:
    """A handler whose only answer is the error; the same for every kind of method, for it reads and writes nothing."""

    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async with aborting(context):
            raise error

    return grpc.unary_unary_rpc_method_handler(refuse)
