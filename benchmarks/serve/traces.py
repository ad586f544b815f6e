"""Recorded loads: when requests came, how long they were, and what they shared.

Azure (`azure`): a CSV file with the columns TIMESTAMP (a date with time), ContextTokens, GeneratedTokens, as in
AzurePublicDataset's AzureLLMInferenceTrace_{code,conv}.csv. Mooncake (`mooncake`): JSON lines with timestamp (ms),
input_length, output_length and hash_ids, one for each 512 tokens of the prompt: prompts that begin with the same ids
begin with the same tokens. Either may be compressed (.gz).
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from core.errors import ConfigError

TraceFormat = Literal["auto", "azure", "mooncake"]
BLOCK_TOKENS = 512
"""Of a Mooncake trace: how many tokens one hash id stands for."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """`at_s` is after the first row of the file."""

    at_s: float
    num_inputs: int
    num_outputs: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, trace_format: TraceFormat = "auto", limit: int | None = None) -> list[TraceRow]:
    """The first `limit` rows in order of time. `ConfigError` names the file and the line at fault."""
    try:
        with open_text(path) as file:
            rows = [*itertools.islice(_rows(path, file, trace_format), limit)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ConfigError("trace", str(path), f"can't be read: {problem}") from error
    if not rows:
        raise ConfigError("trace", str(path), "must have at least one row")
    first_s = min(row.at_s for row in rows)
    rows = [TraceRow(row.at_s - first_s, row.num_inputs, row.num_outputs, row.hash_ids) for row in rows]
    return sorted(rows, key=lambda row: row.at_s)


def open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8")
    return path.open(encoding="utf-8", newline="")


def _rows(path: Path, file: TextIO, trace_format: TraceFormat) -> Iterator[TraceRow]:
    lines = iter(file)
    first = next(lines, "")
    if trace_format == "auto":
        trace_format = "mooncake" if first.lstrip().startswith("{") else "azure"
    numbered = enumerate(itertools.chain([first], lines), start=1)
    parse = _azure if trace_format == "azure" else _mooncake
    yield from parse(path, ((number, line) for number, line in numbered if line.strip()))


def _azure(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[TraceRow]:
    names: list[str] = []
    for number, line in lines:
        values = next(csv.reader([line]))
        if not names:
            names = values
            missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(names)
            if missing:
                raise ConfigError("trace", str(path), f"must have the columns of an Azure trace: no {min(missing)}")
            continue
        try:
            row = dict(zip(names, values, strict=True))
            at = datetime.fromisoformat(row["TIMESTAMP"])
            yield TraceRow(
                (at - datetime(1970, 1, 1, tzinfo=at.tzinfo)).total_seconds(),
                int(row["ContextTokens"]),
                int(row["GeneratedTokens"]),
            )
        except ValueError as error:
            raise ConfigError("trace", f"{path}:{number}", f"is no row of an Azure trace: {error}") from error


def _mooncake(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[TraceRow]:
    for number, line in lines:
        try:
            row: dict[str, Any] = json.loads(line)
            ids = tuple(int(each) for each in row.get("hash_ids", ()))
            yield TraceRow(float(row["timestamp"]) / 1e3, int(row["input_length"]), int(row["output_length"]), ids)
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError("trace", f"{path}:{number}", f"is no row of a Mooncake trace: {error}") from error
