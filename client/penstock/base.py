"""What both clients, and both kinds of generation, share: all but the I/O."""

from __future__ import annotations

import math
import os
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from penstock.access import authorization, tls_credentials
from penstock.batch import BatchProgress
from penstock.errors import InvalidRequestError, PenstockError, UnavailableError
from penstock.progress import Progress
from penstock.retry import RetryPolicy
from penstock.rpc import batch_request, generate_request
from penstock.sampling import Sampling, checked
from penstock.status import error_from
from penstock.types import FinishReason, Message, Stats, TokenLogprobs, Usage
from penstock.v1.inference_pb2 import GenerateBatchRequest, GenerateRequest

if TYPE_CHECKING:
    from typing_extensions import Unpack

DEFAULT_TARGET = "127.0.0.1:50051"
CONTROL_TIMEOUT_S = 10.0
"""At most, for the calls that are answered at once or not at all: every one but `generate`."""


class GenerationBase:
    """What has come of a generation so far. What only the server can tell is None until it has."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The output tokens that have come."""
        return tuple(self._progress.token_ids)

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One for each of `token_ids`, where they were asked for."""
        return tuple(self._progress.logprobs)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """One for each of the prompt's tokens from the second on, where they were asked for."""
        return tuple(self._progress.prompt_logprobs)

    @property
    def request_id(self) -> str | None:
        """What `cancel` takes."""
        return self._progress.request_id

    @property
    def model(self) -> str | None:
        """Name of the model that answers."""
        return self._progress.started.model if self._progress.started else None

    @property
    def seed(self) -> int | None:
        """The seed in use, drawn by the server where the request named none: with it the text can be had again."""
        return self._progress.started.seed if self._progress.started else None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended; None until then."""
        return self._progress.finished.finish_reason if self._progress.finished else None

    @property
    def usage(self) -> Usage | None:
        """Tokens in and out; None until the end."""
        return self._progress.finished.usage if self._progress.finished else None

    @property
    def stats(self) -> Stats | None:
        """Where the time went, as the server tells it; None until the end."""
        return self._progress.finished.stats if self._progress.finished else None


G_co = TypeVar("G_co", bound=GenerationBase, covariant=True)
B_co = TypeVar("B_co", covariant=True)
Metadata = tuple[tuple[str, str], ...]


class ClientBase(ABC, Generic[G_co, B_co]):
    """A connection to one server, made when it is first needed and kept.

    Args:
        target: `host:port`, or any other gRPC target (`unix:/path`, `dns:///name:port`). Or several, of routers that
            share their workers: where one can't be reached, or goes away, the next one goes on.
        timeout_s: limit for a whole generation, queueing and retries included; `math.inf` is none.
        max_retries: how often a generation is tried again that was refused (`OverloadedError`), or whose server could
            not be reached or was lost (`UnavailableError`). The server goes on behind the tokens that have come, so
            none is missing or comes twice. Nothing else is ever tried again.
        wait_for_ready: wait for a server that is not up yet, within the timeout, instead of failing at once.
        api_key: sent with every call; by default the environment's PENSTOCK_API_KEY, where that is set.
        ssl_ca_certs: path of the certificates that the server's own must be signed by, PEM. Turns TLS on, which by
            default is off: who listens on the way then reads the key and all else.
        ssl_certfile, ssl_keyfile: paths of a certificate of this client and its private key, PEM, where the server asks
            for them (mutual TLS).
        credentials: for TLS by other means, such as `grpc.ssl_channel_credentials()` for the public authorities.
        metadata: sent with every call, such as `[("authorization", "Bearer ...")]`.
        keepalive_s: a connection that is silent this long during a call is probed; `math.inf` never probes.
        max_message_bytes: limit of one message, either way.
        sleep, random, clock: for tests.
    """

    def __init__(
        self,
        target: str | Sequence[str] = DEFAULT_TARGET,
        *,
        timeout_s: float = 600.0,
        max_retries: int = 2,
        wait_for_ready: bool = False,
        api_key: str | None = None,
        ssl_ca_certs: str | os.PathLike[str] | None = None,
        ssl_certfile: str | os.PathLike[str] | None = None,
        ssl_keyfile: str | os.PathLike[str] | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Sequence[tuple[str, str]] = (),
        keepalive_s: float = 30.0,
        max_message_bytes: int = 64 * 2**20,
        sleep: Callable[[float], Any] | None = None,
        random: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.targets = tuple(map(_checked_target, [target] if isinstance(target, str) else target))
        if not self.targets:
            raise ValueError("target: must name at least one server")
        self._at = 0
        self.timeout_s = _checked_timeout_s(timeout_s)
        self._retry = RetryPolicy(max_retries, random=random)
        self._wait_for_ready = wait_for_ready
        self._credentials = credentials or tls_credentials(ssl_ca_certs, ssl_certfile, ssl_keyfile)
        self._metadata = (*metadata, *authorization(api_key, metadata))
        self._options = _channel_options(keepalive_s, max_message_bytes)
        self._sleep = sleep
        self._clock = clock
        self._closed = False
        self._connect()

    @property
    def target(self) -> str:
        """The server that calls go to now."""
        return self.targets[self._at]

    def _leave(self, target: str) -> None:
        """It could not be reached: calls go to the next one, unless others have noticed before."""
        if target == self.target:
            self._at = (self._at + 1) % len(self.targets)

    def _retarget(self, progress: Progress | BatchProgress) -> None:
        """Before an attempt: away from a server that was lost at the last one."""
        if progress.lost:
            self._leave(progress.target)
        progress.target = self.target

    @abstractmethod
    def _connect(self) -> None:
        """Make the channel, which connects by itself when it is needed."""

    def generate(
        self,
        prompt: str | None = None,
        *,
        token_ids: Iterable[int] | None = None,
        messages: Iterable[Message | Mapping[str, str]] | None = None,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
        cache_salt: str = "",
        kv_wire_dtype: str = "",
        disaggregate: str = "",
        priority: int = 0,
        user: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        **sampling: Unpack[Sampling],
    ) -> G_co:
        """Start to generate from exactly one of `prompt`, `token_ids` and `messages` (a chat).

        `sampling` are the options of `Sampling`; what is not given, the model's own defaults decide. `temperature` 0 is
        greedy; the text ends before the first of `stop`. `request_id` makes the generation known to `cancel`; an empty
        `model` is the one that is served. Requests share what the server has cached of prompts only under one
        `cache_salt`. `kv_wire_dtype` "int8" lets the server round K and V where it carries them from worker to worker,
        "auto" forbids it. `disaggregate` says whether prefill and decode run on two workers: "require", "prefer" (the
        server weighs it) or "local"; empty leaves it to the server. Requests of a lower `priority` go first; `user` is
        whom the client asks for. `metadata` is sent with this call alone, such as a W3C `traceparent`.
        Raises `InvalidRequestError` here for what can't be sent; all other errors come out of the generation.
        """
        limit_s = self.timeout_s if timeout_s is None else _checked_timeout_s(timeout_s)
        request = generate_request(
            {"prompt": prompt, "token_ids": token_ids, "messages": messages},
            {
                "model": model,
                "request_id": request_id,
                "timeout_s": timeout_s if limit_s < math.inf else None,
                "cache_salt": cache_salt,
                "kv_wire_dtype": kv_wire_dtype,
                "disaggregate": disaggregate,
                "priority": priority,
                "user": user,
            },
            checked(sampling),
        )
        progress = Progress(
            request.request_id, target=self.target, timeout_s=limit_s, retry=self._retry, clock=self._clock
        )
        return self._generation(request, progress, tuple(metadata))

    @abstractmethod
    def _generation(self, request: GenerateRequest, progress: Progress, metadata: Metadata) -> G_co:
        """Send the request for the first time."""

    def generate_batch(
        self,
        prompts: Iterable[str | Sequence[int] | Sequence[Message | Mapping[str, str]]],
        *,
        model: str = "",
        timeout_s: float | None = None,
        cache_salt: str = "",
        kv_wire_dtype: str = "",
        disaggregate: str = "",
        priority: int = 0,
        user: str = "",
        metadata: Sequence[tuple[str, str]] = (),
        **sampling: Unpack[Sampling],
    ) -> B_co:
        """Start to generate from many prompts in one call: texts, token ids, or chats. All are queued, or none.

        The options are those of `generate`, and the same for all; with a `seed`, prompt i has `seed` + i.
        """
        limit_s = self.timeout_s if timeout_s is None else _checked_timeout_s(timeout_s)
        header = {
            "model": model,
            "timeout_s": timeout_s if limit_s < math.inf else None,
            "cache_salt": cache_salt,
            "kv_wire_dtype": kv_wire_dtype,
            "disaggregate": disaggregate,
            "priority": priority,
            "user": user,
        }
        options, requests = checked(sampling), []
        for index, prompt in enumerate(prompts):
            if (seed := sampling.get("seed")) is not None:
                options["seed"] = seed + index
            requests.append(generate_request(_input_of(prompt), header, options))
        progress = BatchProgress(
            len(requests), target=self.target, timeout_s=limit_s, retry=self._retry, clock=self._clock
        )
        return self._batch(batch_request(requests), progress, tuple(metadata))

    @abstractmethod
    def _batch(self, request: GenerateBatchRequest, progress: BatchProgress, metadata: Metadata) -> B_co:
        """Send the request for the first time."""

    def _call_options(self, timeout_s: float | None, metadata: Metadata = ()) -> dict[str, Any]:
        if self._closed:
            raise RuntimeError("this client is closed")
        sent = (*self._metadata, *metadata)
        return {"timeout": timeout_s, "metadata": sent, "wait_for_ready": self._wait_for_ready}

    def _control_options(self) -> dict[str, Any]:
        return self._call_options(min(self.timeout_s, CONTROL_TIMEOUT_S))

    def _error(self, failure: grpc.RpcError, request_id: str | None = None, *, leave: bool = False) -> PenstockError:
        """`leave`: a server that can't be reached is not asked again, where there is another."""
        error = error_from(failure, target=self.target, request_id=request_id)
        if leave and isinstance(error, UnavailableError):
            self._leave(self.target)
        return error


def _input_of(prompt: object) -> dict[str, Any]:
    """A prompt under the name that `generate` gives its kind."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Sequence) and prompt:
        return {"token_ids" if isinstance(prompt[0], int) else "messages": prompt}
    raise InvalidRequestError(f"prompts: got {prompt!r}, must be texts, token ids or chats", "prompts")


def _channel_options(keepalive_s: float, max_message_bytes: int) -> list[tuple[str, Any]]:
    """Ours under gRPC's names; and a lost server is looked for every 0.1 to 2 s, not every 1 to 120 s."""
    if not keepalive_s > 0:
        raise ValueError(f"keepalive_s: got {keepalive_s!r}, must be > 0; math.inf never probes")
    if max_message_bytes < 1:
        raise ValueError(f"max_message_bytes: got {max_message_bytes!r}, must be >= 1")
    options: list[tuple[str, Any]] = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2000),
    ]
    if keepalive_s < math.inf:
        options += [("grpc.keepalive_time_ms", int(keepalive_s * 1000)), ("grpc.keepalive_timeout_ms", 10_000)]
    return options


def _checked_target(target: str) -> str:
    if not target or target.startswith(("http://", "https://")):
        raise ValueError(f"target: got {target!r}, must be host:port, such as {DEFAULT_TARGET!r}")
    return target


def _checked_timeout_s(timeout_s: float) -> float:
    if not isinstance(timeout_s, int | float) or not timeout_s > 0:
        raise InvalidRequestError(f"timeout_s: got {timeout_s!r}, must be > 0; math.inf is no limit", "timeout_s")
    return timeout_s
