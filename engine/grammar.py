"""What a request's grammar lets it draw next, found while the model runs. The grammars are llguidance's."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from core.errors import PenstockError
from engine.plan import PlanEntry
from engine.sampler import Mask
from kernels.sampling import num_mask_words

MAX_GRAMMARS = 64
"""Compiled ones that are kept."""
MAX_STATES = 256
"""Requests whose place in their grammar is remembered; that of others is found again from their tokens."""


class GrammarError(PenstockError):
    """A grammar that does not compile, or whose limits were reached."""


@dataclass(slots=True)
class _State:
    """`token_ids`: the output tokens that the matcher has taken."""

    grammar: str
    matcher: LLMatcher
    token_ids: list[int] = field(default_factory=list)


class PendingMasks:
    """Masks of one step, under way on another thread."""

    def __init__(self, futures: dict[str, Future[list[Mask]]], failures: dict[str, str]) -> None:
        self._futures, self._failures = futures, failures
        self.wait_s = 0.0

    def get(self) -> tuple[dict[str, list[Mask]], dict[str, str]]:
        """Masks of each request, and what went wrong with those that have none. Adds the time waited to `wait_s`."""
        masks, failures = {}, dict(self._failures)
        start = time.perf_counter()
        for request_id, future in self._futures.items():
            try:
                masks[request_id] = future.result()
            except GrammarError as error:
                failures[request_id] = str(error)
        self.wait_s += time.perf_counter() - start
        return masks, failures


class GrammarMasks:
    """Computes token masks on a thread of its own.

    A mask depends on the grammar and the output tokens so far, so it is the same wherever a request goes on; what is
    kept from step to step only saves time. When a grammar is fulfilled, end-of-sequence is allowed; when nothing can
    follow, nothing else is.
    """

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int) -> None:
        """`load` is called when the first grammar comes."""
        self._load, self._num_words = load, num_mask_words(vocab_size)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # this and the next are the thread's own
        self._states: OrderedDict[str, _State] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    @classmethod
    def from_checkpoint(cls, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Self | None:
        """None where the folder has no tokenizer.json: then no request can have a grammar."""
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        return cls(
            lambda: LLTokenizer(str(path), n_vocab=vocab_size, eos_token=list(eos_token_ids) or None), vocab_size
        )

    def prepare(self, grammar: str) -> None:
        """A request with this grammar has come: compile it before its first mask is due."""
        self._thread.submit(self._matcher, grammar)

    def begin(self, entries: Sequence[PlanEntry]) -> PendingMasks:
        """Start on the masks of entries whose `sampling` has a grammar."""
        return PendingMasks({entry.request_id: self._thread.submit(self._masks, entry) for entry in entries}, {})

    def _masks(self, entry: PlanEntry) -> list[Mask]:
        """The mask after the output tokens, and after each draft that the grammar allows; after others, anything."""
        try:
            matcher = self._state(entry).matcher
        except (RuntimeError, ValueError) as error:  # of the library: the tokenizer is none for this model
            raise GrammarError(f"no grammar can be followed: {error}") from error
        masks = [self._mask(matcher)]
        num_taken = 0
        for draft in entry.token_ids[len(entry.token_ids) - entry.num_drafts :]:
            if num_taken + 1 == len(masks) and masks[-1][draft >> 5] >> (draft & 31) & 1 and not matcher.is_stopped():
                matcher.consume_token(draft)
                num_taken += 1
                masks.append(self._mask(matcher))
            else:
                masks.append(masks[-1])
        matcher.rollback(num_taken)
        return masks

    def _state(self, entry: PlanEntry) -> _State:
        assert entry.sampling is not None
        history = np.frombuffer(entry.history, np.int32)
        output = history[len(history) - entry.num_output_tokens :].tolist()
        state = self._states.pop(entry.request_id, None)
        if (
            state is None
            or state.grammar != entry.sampling.grammar
            or state.token_ids != output[: len(state.token_ids)]
        ):
            state = _State(entry.sampling.grammar, self._matcher(entry.sampling.grammar).deep_copy())
        state.matcher.consume_tokens(output[len(state.token_ids) :])
        if state.matcher.is_error():
            raise GrammarError(f"the grammar can't go on: {state.matcher.get_error().splitlines()[0]}")
        state.token_ids = output
        self._states[entry.request_id] = state
        if len(self._states) > MAX_STATES:
            self._states.popitem(last=False)
        return state

    def _matcher(self, grammar: str) -> LLMatcher:
        """At the beginning of the grammar: to be copied, not moved."""
        matcher = self._compiled.pop(grammar, None)
        if matcher is None:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
            matcher.compute_bitmask()  # the first takes as long as compiling did
        self._compiled[grammar] = matcher
        if len(self._compiled) > MAX_GRAMMARS:
            self._compiled.popitem(last=False)
        return matcher

    def _mask(self, matcher: LLMatcher) -> Mask:
        mask = np.empty(self._num_words, np.uint32)
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            raise GrammarError(f"the grammar can't go on: {matcher.get_error().splitlines()[0]}")
        return mask
