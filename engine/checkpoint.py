"""The safetensors files of a checkpoint: what they hold, whether they are whole, and their fingerprint. No torch.

Format: eight bytes with the header's length (little-endian), a JSON header, then the data of the tensors.
https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from core.errors import CheckpointError
from engine.json_fields import read_json

_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_MAX_HEADER_BYTES = 100_000_000
_HASHED_WHOLE_BYTES = 64 * 2**20
_SAMPLE_BYTES = 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: its bytes are [start, end) of `file`."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors in the safetensors files of a folder."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers of all files. `CheckpointError` where a file is missing, truncated, or malformed."""
        folder = Path(path)
        tensors: dict[str, StoredTensor] = {}
        for file, names in _files(folder).items():
            held = _read_header(file)
            for name in names - held.keys():
                raise CheckpointError(f"{file}: tensor {name} is not in it, though the index says so; copy both again")
            tensors.update(held)
        return cls(folder, tensors)

    def fingerprint(self) -> str:
        """32 hex digits that tell this checkpoint from any other.

        A hash of config.json (its values, not its spelling), the names, types, shapes and places of all tensors, and
        their bytes: all of them up to 64 MiB together, beyond that 1 KiB from the middle of each tensor.
        """
        config = json.dumps(read_json(self.folder / "config.json"), sort_keys=True)
        digest = hashlib.blake2b(config.encode(), digest_size=16)
        ordered = sorted(self.tensors.items(), key=lambda item: (item[1].file, item[1].start, item[0]))
        whole = sum(tensor.end - tensor.start for _, tensor in ordered) <= _HASHED_WHOLE_BYTES
        for file, held in groupby(ordered, key=lambda item: item[1].file):
            with file.open("rb") as stream:
                for name, tensor in held:
                    num_bytes = tensor.end - tensor.start
                    digest.update(f"{file.name} {name} {tensor.dtype} {tensor.shape} {tensor.start}\n".encode())
                    num_read = num_bytes if whole else min(num_bytes, _SAMPLE_BYTES)
                    stream.seek(tensor.start + (num_bytes - num_read) // 2)
                    digest.update(stream.read(num_read))
        return digest.hexdigest()


def _files(folder: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the tensors that the index promises of it."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise CheckpointError(
                f"{folder}: holds neither model.safetensors nor model.safetensors.index.json; "
                "other weight formats must be converted to safetensors first"
            )
        return {single: set()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; copy the file again")
    files: dict[Path, set[str]] = {}
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index}: tensor {name}: got {file_name!r}, must be the name of a file beside it")
        files.setdefault(folder / file_name, set()).add(name)
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            num_header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
            text = stream.read(num_header_bytes) if num_header_bytes <= _MAX_HEADER_BYTES else b""
            num_bytes = stream.seek(0, 2)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, though the index names it; copy the missing shard") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error})") from None
    try:
        header = json.loads(text)
        data_start = 8 + num_header_bytes
        return {n: _stored(file, entry, data_start, num_bytes) for n, entry in header.items() if n != "__metadata__"}
    except _TruncatedError as error:
        raise CheckpointError(
            f"{file}: is truncated: {num_bytes} bytes, of at least {error.num_bytes}; copy the file again"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{file}: has no valid safetensors header; copy the file again") from None


class _TruncatedError(Exception):
    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


def _stored(file: Path, entry: dict[str, Any], data_start: int, num_file_bytes: int) -> StoredTensor:
    """One entry of a header; ValueError, TypeError or KeyError where it makes no sense."""
    start, end = (data_start + int(offset) for offset in entry["data_offsets"])
    shape, dtype = tuple(int(size) for size in entry["shape"]), str(entry["dtype"])
    if not data_start <= start <= end or (
        dtype in _ITEM_BYTES and end - start != math.prod(shape) * _ITEM_BYTES[dtype]
    ):
        raise ValueError("offsets and shape disagree")
    if end > num_file_bytes:
        raise _TruncatedError(end)
    return StoredTensor(file, shape, dtype, start, end)
