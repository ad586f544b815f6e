from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from telemetry.logs import LineFormatter, LogFormat, configure_logging


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    """The root logger, put back afterwards as it was."""
    logger = logging.getLogger()
    handlers, level = [*logger.handlers], logger.level
    yield logger
    logger.handlers[:] = handlers
    logger.setLevel(level)


def line(log_format: LogFormat, message: str, *args: object, **extra: object) -> str:
    record = logging.LogRecord("router.workers", logging.WARNING, "f.py", 1, message, args, None)
    record.created = 0.5
    vars(record).update(extra)
    return LineFormatter(log_format).format(record)


def test_a_text_line_is_made_of_keys_and_values() -> None:
    expected = 'time=1970-01-01T00:00:00.500Z level=warning logger=router.workers message="worker p0 is \\"lost\\"" n=3'
    assert line("text", "worker %s is %s", "p0", '"lost"', n=3) == expected


def test_a_json_line_holds_the_same_fields() -> None:
    assert json.loads(line("json", "größer", worker="p0", error=ValueError("x"))) == {
        "time": "1970-01-01T00:00:00.500Z",
        "level": "warning",
        "logger": "router.workers",
        "message": "größer",
        "worker": "p0",
        "error": "x",
    }


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_record_is_one_line_even_with_a_traceback(log_format: LogFormat, root: logging.Logger) -> None:
    stream = io.StringIO()
    configure_logging(stream, log_format=log_format)
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        logging.getLogger("x").exception("it\nfailed")
    assert stream.getvalue().count("\n") == 1
    assert "Traceback (most recent call last)" in stream.getvalue()


def test_configuring_twice_writes_once(root: logging.Logger) -> None:
    old, new = io.StringIO(), io.StringIO()
    configure_logging(old)
    configure_logging(new, level="warning")
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert (old.getvalue(), new.getvalue().count("loud"), new.getvalue().count("quiet")) == ("", 1, 0)
