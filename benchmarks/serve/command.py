"""`penstock bench serve` and `penstock bench compare`."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from benchmarks.serve.backends import OpenAIBackend, PenstockBackend, Shape, error_message
from benchmarks.serve.driver import Backend, Driver, Load
from benchmarks.serve.http_stream import HttpError, HttpStream, Url, request_bytes
from benchmarks.serve.options import DEFAULT_NUM_PROMPTS, BenchCompare, BenchServe
from benchmarks.serve.plot import plot
from benchmarks.serve.report import METRICS, Json, parse_goodput, report
from benchmarks.serve.show import print_comparison, print_report, progress_bar, read_result
from benchmarks.serve.traces import read_trace
from benchmarks.serve.workload import Plan, Prompts, Scale, at_rate, random_lengths
from core.errors import ConfigError, UnavailableError
from penstock import AsyncClient, PenstockError

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
ASK_TIMEOUT_S = 30.0


def bench_serve(options: BenchServe, console: Console | None = None) -> int:
    """0 where every request succeeded, else 1. Raises `ConfigError`, `UnavailableError`."""
    metrics, percentiles, goodput = _checked_names(options)
    before = read_result(options.compare) if options.compare else None
    plans = make_plans(options)
    settings, load = asyncio.run(_run(options, plans))
    result = report(
        load,
        settings=settings,
        percentiles=percentiles,
        goodput=goodput,
        detailed=options.save_detailed,
    )
    if options.result_filename:
        _write(options, result)
    if options.plot:
        plot([result] if before is None else [before, result], options.plot)
    console = console or Console()
    if options.json:
        print(json.dumps(result))
    else:
        print_report(result, console, metrics, percentiles)
        if before is not None:
            print_comparison(before, result, console)
    return 0 if result["failed"] == 0 else 1


def bench_compare(options: BenchCompare, console: Console | None = None) -> int:
    a, b = read_result(options.a), read_result(options.b)
    a.setdefault("label", ""), b.setdefault("label", "")
    for result, path in ((a, options.a), (b, options.b)):
        result["label"] = result["label"] or path.stem
    if options.plot:
        plot([a, b], options.plot)
    if options.json:
        print(json.dumps({"a": a, "b": b}))
    else:
        print_comparison(a, b, console or Console())
    return 0


def make_plans(options: BenchServe) -> list[Plan]:
    """Every request of the run: the same for the same options."""
    if options.trace is None:
        count = options.num_prompts or DEFAULT_NUM_PROMPTS
        ratio, seed = options.random_range_ratio, options.seed
        inputs = random_lengths(count, options.random_input_len, ratio, [seed, 5])
        outputs = random_lengths(count, options.random_output_len, ratio, [seed, 6])
        prefix = options.random_prefix_len
        plans = [
            Plan(i, 0.0, prefix + num_inputs, num_outputs, prefix_tokens=prefix)
            for i, (num_inputs, num_outputs) in enumerate(zip(inputs, outputs, strict=True))
        ]
        return at_rate(plans, options.request_rate, options.burstiness, seed)
    limit = None if options.num_prompts is None else options.trace_start + options.num_prompts
    rows = read_trace(options.trace, options.trace_format, limit)[options.trace_start :]
    if not rows:
        raise ConfigError("trace_start", options.trace_start, "must leave a row of the trace")
    scale = Scale(
        options.time_scale, options.input_scale, options.output_scale, options.max_input_len, options.max_output_len
    )
    plans = [scale.plan(i, row) for i, row in enumerate(rows)]
    if not math.isinf(options.request_rate):
        return at_rate(plans, options.request_rate, options.burstiness, options.seed)
    first_s = plans[0].due_s
    return [replace(plan, due_s=plan.due_s - first_s) for plan in plans]


async def _run(options: BenchServe, plans: Sequence[Plan]) -> tuple[Json, Load]:
    async with AsyncExitStack() as stack:
        backend, model, vocab_size = await _backend(options, stack)
        closed = options.max_concurrency is not None and options.trace is None and math.isinf(options.request_rate)
        await _warm_up(options, plans, backend)
        gc.collect()
        gc.freeze()  # what is there now needs no more looking at: a full collection would stop the clock for ms
        hidden = options.disable_tqdm or options.json
        with progress_bar(len(plans), hidden=hidden) as on_progress:
            driver = Driver(
                backend,
                max_concurrency=options.max_concurrency,
                closed_loop=closed,
                timeout_s=options.request_timeout_s,
                on_progress=on_progress,
            )
            load = await driver.run(plans)
        gc.unfreeze()
    return _settings(options, plans, model, vocab_size, closed=closed), load


async def _warm_up(options: BenchServe, plans: Sequence[Plan], backend: Backend) -> None:
    """One after another, with prompts of their own."""
    count = options.num_warmups
    extra = [
        replace(plans[i % len(plans)], index=len(plans) + i, due_s=0.0, hash_ids=(), prefix_tokens=0)
        for i in range(count)
    ]
    load = await Driver(backend, max_concurrency=1, closed_loop=True, timeout_s=options.request_timeout_s).run(extra)
    for record in load.records:
        if record.error:
            raise UnavailableError(f"{options.base_url}: a warm-up request failed: {record.error}")


async def _backend(options: BenchServe, stack: AsyncExitStack) -> tuple[Backend, str, int]:
    """With the model's name and the vocabulary that prompts are drawn from."""
    extra = _extra_body(options.extra_body)
    if options.backend == "penstock":
        if extra:
            raise ConfigError("extra_body", options.extra_body, "is for servers with the OpenAI API")
        target = options.base_url.removeprefix("http://")
        client = AsyncClient(target, timeout_s=options.request_timeout_s, max_retries=0)
        await stack.enter_async_context(client)
        try:
            described = await client.model(options.model or "")
        except PenstockError as error:
            raise UnavailableError(str(error)) from error
        shape = _shape(options, described.name, described.vocab_size, extra)
        return PenstockBackend(client, shape), described.name, described.vocab_size
    headers = _pairs("header", options.header)
    if (key := os.environ.get("OPENAI_API_KEY")) and "authorization" not in {name.lower() for name in headers}:
        headers["Authorization"] = f"Bearer {key}"
    url = Url.parse(options.base_url, options.endpoint or ENDPOINTS[options.backend])
    model = options.model or await _first_model(options.base_url, headers)
    shape = _shape(options, model, options.vocab_size, extra)
    chat = options.backend == "openai-chat"
    return OpenAIBackend(url, shape, chat=chat, headers=headers), model, options.vocab_size


def _shape(options: BenchServe, model: str, vocab_size: int, extra: Mapping[str, Any]) -> Shape:
    prompts = Prompts(vocab_size, options.seed)
    return Shape(model, prompts, options.temperature, options.ignore_eos, extra)


async def _first_model(base_url: str, headers: Mapping[str, str]) -> str:
    url = Url.parse(base_url, "/v1/models")
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            async with HttpStream(url, request_bytes("GET", url, headers)) as stream:
                body = await stream.body()
        if stream.status != 200:
            raise UnavailableError(f"{base_url}: HTTP {stream.status}: {error_message(body)}")
        return str(json.loads(body)["data"][0]["id"])
    except (HttpError, TimeoutError) as error:
        raise UnavailableError(f"{base_url} is unavailable: {error or 'no answer'}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UnavailableError(f"{base_url}: /v1/models lists no model: give --model") from error


def _settings(options: BenchServe, plans: Sequence[Plan], model: str, vocab_size: int, *, closed: bool) -> Json:
    rate = options.request_rate
    return {
        "date": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
        "label": options.label,
        "backend": options.backend,
        "model_id": model,
        "num_prompts": len(plans),
        "request_rate": "inf" if math.isinf(rate) else rate,
        "closed_loop": closed,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "trace": options.trace.name if options.trace else None,
        "trace_start": options.trace_start,
        "time_scale": options.time_scale,
        "input_scale": options.input_scale,
        "output_scale": options.output_scale,
        "max_input_len": options.max_input_len,
        "max_output_len": options.max_output_len,
        "vocab_size": vocab_size,
        "seed": options.seed,
        "ignore_eos": options.ignore_eos,
        "temperature": options.temperature,
        **_pairs("metadata", options.metadata),
    }


def _checked_names(options: BenchServe) -> tuple[list[str], list[float], dict[str, float]]:
    metrics = [name.strip() for name in options.percentile_metrics.split(",") if name.strip()]
    for name in metrics:
        if name not in METRICS:
            raise ConfigError("percentile_metrics", name, f"must be some of {','.join(METRICS)}")
    try:
        percentiles = [float(each) for each in options.metric_percentiles.split(",")]
        if not all(0 <= each <= 100 for each in percentiles):
            raise ValueError
    except ValueError:
        raise ConfigError("metric_percentiles", options.metric_percentiles, "must be numbers, such as 50,99") from None
    return metrics, percentiles, parse_goodput(options.goodput)


def _pairs(field: str, pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ConfigError(field, pair, "must be KEY=VALUE")
    return dict(pair.split("=", 1) for pair in pairs)


def _extra_body(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ConfigError("extra_body", text, f"must be a JSON object: {error}") from error
    if not isinstance(body, dict):
        raise ConfigError("extra_body", text, "must be a JSON object")
    return body


def _write(options: BenchServe, result: Json) -> None:
    assert options.result_filename is not None
    try:
        options.result_filename.parent.mkdir(parents=True, exist_ok=True)
        options.result_filename.write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ConfigError("result_filename", str(options.result_filename), f"can't be written: {error}") from error
