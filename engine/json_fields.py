"""Typed access to a checkpoint's JSON files: every error names file, field, value and fix."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from core.errors import CheckpointError, shorten


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `CheckpointError` where there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is {path.parent} the folder of a checkpoint?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({error}); copy the file again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; copy the file again")
    return values


class Fields:
    """The fields of one object. A field that is null counts as missing, as in transformers."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self._values, self._prefix = path, values, prefix

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def names(self) -> tuple[str, ...]:
        """The fields that are there, null or not."""
        return tuple(self._values)

    def error(self, name: str, must: str) -> CheckpointError:
        value = self._values.get(name)
        got = "is missing" if value is None else f"got {shorten(value)}"
        return CheckpointError(f"{self.path}: {self._prefix}{name}: {got}, {must}")

    def group(self, name: str) -> Fields | None:
        """A nested object."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(self.path, value, f"{self._prefix}{name}.")

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, f"must be an integer >= {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise self.error(name, "must be a number > 0")
        return float(value)

    def boolean(self, name: str, default: bool = False) -> bool:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """One integer or a list of them, each once; empty where the field is missing."""
        value = self.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(v, int) or isinstance(v, bool) or v < 0 for v in values):
            raise self.error(name, "must be an integer >= 0 or a list of them")
        return tuple(dict.fromkeys(values))
