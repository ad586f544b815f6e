"""llama.cpp through llama-cpp-python: run_llamacpp.py MODEL.gguf NUM_THREADS"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

from driver import Drawn, serve_stdio

MAX_SEQUENCES, MAX_MODEL_LEN, MAX_BATCH = 32, 576, 2048


class LlamaCpp:
    """Its C interface, as its own batched examples use it: sequences are numbers, one call takes tokens of many."""

    def __init__(self, model: str, num_threads: int) -> None:
        import llama_cpp

        self.name = f"llama-cpp-python {llama_cpp.__version__}"
        self._llama: Any = llama_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self._model: Any = llama_cpp.llama_model_load_from_file(model.encode(), model_params)
        if not self._model:
            raise ValueError(f"llama.cpp can't load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = MAX_SEQUENCES * MAX_MODEL_LEN, MAX_BATCH, MAX_SEQUENCES
        params.n_threads = params.n_threads_batch = num_threads
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError("llama.cpp can't make a context")
        self._batch: Any = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        pending = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for output in range(num_outputs):
            drawn: Drawn = []
            for start in range(0, len(pending), MAX_BATCH):
                step = self._decode(pending[start : start + MAX_BATCH])
                drawn += step
                yield step
            pending = [(token, len(prompts[sequence]) + output, sequence, True) for sequence, token in drawn]

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> Drawn:
        """Rows of (token, position, sequence, whether it draws); the tokens drawn."""
        batch, llama = self._batch, self._llama
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, draws) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, draws
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        import numpy as np

        shape = ctypes.c_float * self._vocab_size
        drawn: Drawn = []
        for i, (_, _, sequence, draws) in enumerate(rows):
            if draws:
                logits = shape.from_address(ctypes.addressof(llama.llama_get_logits_ith(self._context, i).contents))
                drawn.append((sequence, int(np.argmax(np.frombuffer(logits, np.float32)))))
        return drawn


if __name__ == "__main__":
    serve_stdio(lambda: LlamaCpp(sys.argv[1], int(sys.argv[2])))
