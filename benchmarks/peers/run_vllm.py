"""vLLM's CPU build, offline: run_vllm.py MODEL_FOLDER [DTYPE]"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

from driver import Drawn, serve_stdio

MAX_MODEL_LEN = 2048


class VLLM:
    def __init__(self, model: str, dtype: str) -> None:
        import vllm

        self.name = f"vLLM {vllm.__version__}"
        self._vllm: Any = vllm
        llm = vllm.LLM(model=model, dtype=dtype, max_model_len=MAX_MODEL_LEN, enable_prefix_caching=False, seed=0)
        self._engine: Any = llm.llm_engine
        self._ids = itertools.count()

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        from vllm.sampling_params import RequestOutputKind

        sampling = self._vllm.SamplingParams(
            temperature=0,
            max_tokens=num_outputs,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        sequences: dict[str, int] = {}
        for sequence, prompt in enumerate(prompts):
            request_id = str(next(self._ids))
            sequences[request_id] = sequence
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            yield [
                (sequences[output.request_id], token)
                for output in self._engine.step()
                for token in output.outputs[0].token_ids
            ]


if __name__ == "__main__":
    serve_stdio(lambda: VLLM(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "float32"))
