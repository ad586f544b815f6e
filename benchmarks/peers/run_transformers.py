"""transformers, eager: run_transformers.py MODEL_FOLDER NUM_THREADS"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from driver import Drawn, serve_stdio


class Transformers:
    """Prompts run as one batch, so they must be of equal length."""

    def __init__(self, model: str, num_threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(num_threads)
        self.name = f"transformers {transformers.__version__}"
        self._torch: Any = torch
        model_class: Any = transformers.AutoModelForCausalLM
        self._model: Any = model_class.from_pretrained(model, dtype=torch.float32).eval()

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        ids, cache = self._torch.tensor(prompts), None
        for _ in range(num_outputs):
            with self._torch.inference_mode():
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = out.logits.argmax(dim=-1), out.past_key_values
            yield list(enumerate(ids.flatten().tolist()))


if __name__ == "__main__":
    serve_stdio(lambda: Transformers(sys.argv[1], int(sys.argv[2])))
