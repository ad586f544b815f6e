"""What guessing ahead gains one request that goes on with a source file which is in its prompt.

Random models loop and prove nothing; the embedded model was made for Python. Its prompt is the first part of a module
of the standard library and then the beginning of that part once more, so that it may copy or go on. Every prompt is
another module: what a proposer learnt from one request helps the next only as far as modules resemble each other.
"""

from __future__ import annotations

import statistics
import sysconfig
from contextlib import ExitStack
from pathlib import Path

from benchmarks.comparison import START_PROMPT
from benchmarks.engine_process import EngineError, EngineProcess, own_spec
from benchmarks.own_rows import ROOT, TINY
from benchmarks.rows import Row
from text.tokenizer import Tokenizer

MODULES = (
    *("abc", "argparse", "ast", "bisect", "calendar", "cmd", "codecs", "configparser", "contextlib", "copy"),
    *("csv", "dataclasses", "difflib", "enum", "filecmp", "fnmatch", "fractions", "functools", "getopt", "glob"),
    *("gzip", "heapq", "inspect", "ipaddress", "locale", "mailbox", "pathlib", "pdb", "pickle", "queue"),
)
NUM_SOURCE, NUM_REPEATED, NUM_OUTPUTS = 288, 32, 160
"""Tokens; together below the 512 that the model was trained with."""
TARGET = 1.8
METHODS = ("ngram", "token_recycling")
PLAIN = "plain"


def source_prompts() -> list[list[int]]:
    """One of each module, NUM_SOURCE + NUM_REPEATED tokens."""
    tokenizer = Tokenizer.from_folder(TINY)
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [tokenizer.encode((folder / f"{name}.py").read_text())[:NUM_SOURCE] for name in MODULES]
    return [source + source[:NUM_REPEATED] for source in sources]


def speculation_rows(log_folder: Path, num_rounds: int, num_files: int) -> list[Row]:
    """One for each way to guess, on one core; the target is for the best. `num_files`: prompts of a round.

    Raises `EngineError`, also where guesses change what is written.
    """
    prompts = source_prompts()
    rounds = [prompts[i * num_files : (i + 1) * num_files] for i in range(num_rounds)]
    rates = _measure(rounds, log_folder)
    medians = {label: statistics.median(each) for label, each in rates.items()}
    best = max(METHODS, key=lambda method: medians[method])
    detail = f"{num_rounds * num_files} source files gone on with, {NUM_OUTPUTS} tokens each, the same with and without"
    return [
        Row.of(
            f"penstock-tiny, decode, batch 1, speculation by {method}",
            medians[method],
            "tokens/s",
            TARGET if method == best else 0.0,
            medians[PLAIN],
            detail=detail,
        )
        for method in METHODS
    ]


def _measure(rounds: list[list[list[int]]], log_folder: Path) -> dict[str, list[float]]:
    """Tokens in a second of each round, by label; in a round every engine runs the same prompts, one by one."""
    configs: dict[str, dict[str, object]] = {PLAIN: {}}
    configs |= {method: {"speculative_config": {"method": method}} for method in METHODS}
    with ExitStack() as stack:
        engines = {}
        for label, config in configs.items():
            spec = own_spec(f"speculation: {label}", TINY, ROOT, num_threads=1, **config)
            engines[label] = stack.enter_context(EngineProcess(spec, log_folder / f"speculation-{label}.log"))
            engines[label].first_token_s(START_PROMPT)
            engines[label].pause()
        rates: dict[str, list[float]] = {label: [] for label in engines}
        for prompts in rounds:
            written = {label: _run(engine, prompts, rates[label]) for label, engine in engines.items()}
            if any(tokens != written[PLAIN] for tokens in written.values()):
                raise EngineError("speculation: it changed what is written")
        return rates


def _run(engine: EngineProcess, prompts: list[list[int]], rates: list[float]) -> list[list[int]]:
    """What was written; its rate is added to `rates`."""
    engine.resume()
    runs = [engine.run([prompt], NUM_OUTPUTS) for prompt in prompts]
    engine.pause()
    rates.append(sum(NUM_OUTPUTS - run.num_before for run in runs) / sum(run.end_s - run.first_s for run in runs))
    return [run.tokens[0] for run in runs]
