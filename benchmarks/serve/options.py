"""The flags of `penstock bench serve` and `penstock bench compare`; named as `vllm bench serve` has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core.errors import ConfigError

DEFAULT_NUM_PROMPTS = 1000


@dataclass(frozen=True, slots=True)
class BenchServe:
    """Load a server as clients would, in an open loop, and report what they felt.

    Requests are sent when they are due, whatever became of those before, and all times count from then: waiting for
    --max-concurrency is in them. Any server with the OpenAI API will do, or ours by gRPC (--backend penstock).
    """

    backend: Literal["openai", "openai-chat", "penstock"] = "openai"
    """openai: /v1/completions with prompts of token ids; openai-chat: /v1/chat/completions with about as many words."""
    base_url: str = "http://127.0.0.1:8000"
    """Of the server; host:port of the router's gRPC with --backend penstock."""
    endpoint: str | None = None
    """Path of the API, where it is not the usual one."""
    model: str | None = None
    """By default the first that the server lists."""
    header: tuple[str, ...] = ()
    """KEY=VALUE, sent with each request. $OPENAI_API_KEY is sent as a bearer token."""
    request_rate: Annotated[float, tyro.conf.arg(aliases=["--rate"])] = math.inf
    """Requests per second. inf: all at once, or with --max-concurrency as fast as they end (a closed loop)."""
    burstiness: float = 1.0
    """Shape of the gamma distribution of arrivals: 1 is Poisson, below is burstier, above is more even."""
    max_concurrency: int | None = None
    """Most requests under way at once. What is due beyond that waits in this client, and its time runs."""
    num_prompts: int | None = None
    """Requests to send: 1000 by default, or all of the trace."""
    trace: Path | None = None
    """Lengths, arrivals and shared prefixes of this recorded load: an Azure CSV or a Mooncake JSONL file, .gz or not.
    With --request-rate arrivals are drawn, and only lengths and prefixes are the trace's."""
    trace_format: Literal["auto", "azure", "mooncake"] = "auto"
    trace_start: int = 0
    """Rows of the trace to pass over."""
    time_scale: float = 1.0
    """A second of the trace takes so many seconds: below 1 is faster."""
    input_scale: float = 1.0
    """Prompt lengths of the trace are multiplied by this, shared prefixes with them."""
    output_scale: float = 1.0
    max_input_len: int | None = None
    """Longer prompts of the trace are cut, after scaling."""
    max_output_len: int | None = None
    random_input_len: int = 1024
    """Prompt tokens without a trace."""
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    """Lengths are uniform within this share around the two above; [0, 1)."""
    random_prefix_len: int = 0
    """So many tokens of each prompt are the same in all."""
    vocab_size: int = 1000
    """Token ids of prompts are drawn below this."""
    seed: int = 0
    ignore_eos: bool = True
    """Always write as many tokens as planned, so that every run is of the same size."""
    temperature: float = 0.0
    extra_body: str = ""
    """A JSON object, added to each request's body."""
    num_warmups: int = 0
    """Requests to send before, one after another, that don't count."""
    request_timeout_s: float = 600.0
    goodput: tuple[str, ...] = ()
    """Limits in ms that make a request a good one, such as ttft:200 tpot:50; of ttft, tpot, e2el, max_itl."""
    percentile_metrics: str = "ttft,tpot,itl,max_itl,e2el"
    """What the table shows."""
    metric_percentiles: str = "50,90,99"
    result_filename: Path | None = None
    """Write all figures to this file, as JSON."""
    save_detailed: bool = False
    """With every request's own times."""
    label: str = ""
    """Names the run in comparisons and plots."""
    metadata: tuple[str, ...] = ()
    """KEY=VALUE, kept in the result."""
    plot: Path | None = None
    """Write attainment curves to this PNG; needs matplotlib."""
    compare: Path | None = None
    """Show the result in this file beside this run's."""
    disable_tqdm: bool = False
    """No progress bar."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        positive = ("request_rate", "burstiness", "max_concurrency", "num_prompts", "time_scale", "input_scale")
        more = ("output_scale", "max_input_len", "max_output_len", "random_input_len", "random_output_len")
        for name in (*positive, *more, "request_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(name, value, "must be > 0")
        if self.vocab_size < 2:
            raise ConfigError("vocab_size", self.vocab_size, "must be >= 2")
        for name in ("trace_start", "random_prefix_len", "num_warmups", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(name, getattr(self, name), "must be >= 0")
        if not 0.0 <= self.random_range_ratio < 1.0:
            raise ConfigError("random_range_ratio", self.random_range_ratio, "must be in [0, 1)")


@dataclass(frozen=True, slots=True)
class BenchCompare:
    """Show two results of `penstock bench serve` side by side."""

    a: Annotated[Path, tyro.conf.Positional]
    b: Annotated[Path, tyro.conf.Positional]
    plot: Path | None = None
    """Write the attainment curves of both to this PNG; needs matplotlib."""
    json: bool = False
    """Print both as one JSON object."""
