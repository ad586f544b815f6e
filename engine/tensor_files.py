"""The tensors of a checkpoint in memory that the operating system can take back: its files, mapped."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class TensorFiles:
    """Views into the files of a checkpoint, which must stay as they are while a view is in use. Nothing is copied."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str) -> Tensor:
        """The tensor, of the type that it is stored in. `CheckpointError` where its file can't be mapped."""
        stored = self._checkpoint.tensors[name]
        dtype = _DTYPES[stored.dtype]
        if stored.start == stored.end:
            return torch.empty(stored.shape, dtype=dtype)
        mapped = self._map(stored.file)
        if stored.start % dtype.itemsize:  # the format does not promise alignment
            data = torch.frombuffer(bytearray(mapped[stored.start : stored.end]), dtype=dtype)
        else:
            count = (stored.end - stored.start) // dtype.itemsize
            data = torch.frombuffer(mapped, dtype=dtype, count=count, offset=stored.start)
        return data.view(stored.shape)

    def release_pages(self) -> None:
        """Take what was read so far out of this process's memory; views read it again from the file where needed."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: Path) -> mmap.mmap:
        """A private mapping: writable, as torch wants it, though nobody writes."""
        if file not in self._maps:
            try:
                with file.open("rb") as stream:
                    self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: can't be mapped into memory ({error}); copy the file again") from None
        return self._maps[file]
