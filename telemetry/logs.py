"""Logs: one line a record, for people (`key=value`) or for machines (JSON)."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

LogFormat = Literal["text", "json"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure_logging(stream: TextIO, *, log_format: LogFormat = "text", level: str = "info") -> None:
    """For a process as a whole: every logger writes to `stream` in this format. Replaces what was set up before."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(log_format))
    root = logging.getLogger()
    for old in [*root.handlers]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class LineFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, then whatever was given as `extra`, and the traceback in one string."""

    def __init__(self, log_format: LogFormat) -> None:
        super().__init__()
        self._write = _json_line if log_format == "json" else _text_line

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return self._write(fields)


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, default=str)


def _text_line(fields: dict[str, Any]) -> str:
    return " ".join(f"{name}={_quoted(str(value))}" for name, value in fields.items())


def _quoted(value: str) -> str:
    """As it is where it is one word; else a JSON string, so that a record stays one line."""
    plain = value.isprintable() and not any(character in value for character in ' "=')
    return value if plain and value else json.dumps(value, ensure_ascii=False)
