"""What a grammar allows, from the embedded model: the output fits it, and is the same however it came about."""

import json
import re
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from llguidance import LLMatcher, LLTokenizer

from core.request import FinishReason, Request
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.grammar import GrammarMasks
from engine.plan import Plan, PlanEntry
from kernels.native import library

MODEL = Path(__file__).parents[2] / "models" / "penstock-tiny"
EOS = 0
REGEX = "(red|green|blue) [0-9]{3,5}(, [a-z]{1,4}){0,2};"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer", "maximum": 999}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
GRAMMARS = {
    "regex": LLMatcher.grammar_from_regex(REGEX),
    "json": LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_flexible": False}),
    "lark": LLMatcher.grammar_from_lark('start: "(" pair ")"\npair: item "-" item\nitem: "x" | /[0-9]{1,4}/'),
}
PROMPT = list(range(40, 70))


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(str(MODEL / "tokenizer.json"), eos_token=[EOS])


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine.from_checkpoint(MODEL, EngineConfig(num_blocks=40, num_threads=1, device="cpu"))


def params(grammar: str, max_tokens: int = 60, **changes: object) -> SamplingParams:
    rules: dict[str, object] = {"temperature": 1.3, "seed": 4, "stop_token_ids": (EOS,), "frequency_penalty": 0.2}
    return SamplingParams(max_tokens=max_tokens, grammar=GRAMMARS[grammar], **{**rules, **changes})  # type: ignore[arg-type]


def finish(engine: Engine, *requests: Request) -> None:
    for request in requests:
        engine.scheduler.add(request)
    while engine.scheduler.requests:
        engine.step()


def fits(grammar: str, text: str) -> bool:
    if grammar == "json":
        value = json.loads(text)
        return isinstance(value["name"], str) and isinstance(value["size"], int) and len(value) == 2
    if grammar == "regex":
        return re.fullmatch(REGEX, text) is not None
    return re.fullmatch(r"\((x|[0-9]{1,4})-(x|[0-9]{1,4})\)", text) is not None


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_output_fits_the_grammar_and_ends(
    engine: Engine, tokenizer: LLTokenizer, grammar: str, temperature: float
) -> None:
    request = Request("a", PROMPT, params(grammar, 100, temperature=temperature))
    finish(engine, request)
    assert request.finish_reason is FinishReason.STOP
    assert request.output_token_ids[-1] == EOS
    assert fits(grammar, tokenizer.decode_str(request.output_token_ids[:-1]))


def test_output_is_the_same_alone_batched_and_resumed(engine: Engine) -> None:
    alone = {grammar: Request(grammar, PROMPT, params(grammar)) for grammar in GRAMMARS}
    for request in alone.values():
        finish(engine, request)
    batched = [Request(f"{grammar}, batched", PROMPT, params(grammar)) for grammar in GRAMMARS]
    finish(engine, *batched)
    assert [r.output_token_ids for r in batched] == [r.output_token_ids for r in alone.values()]
    for grammar, request in alone.items():
        tokens = request.output_token_ids
        half = len(tokens) // 2
        resumed = Request(f"{grammar}, resumed", PROMPT + tokens[:half], params(grammar), num_prompt_tokens=len(PROMPT))
        finish(engine, resumed)
        assert resumed.output_token_ids == tokens[half:]


def test_masks_follow_drafts_and_come_back(tokenizer: LLTokenizer) -> None:
    """One for each draft that the grammar allows, equal to the mask that stands there without drafts."""
    masks = GrammarMasks(lambda: tokenizer, tokenizer.vocab_size)
    text = tokenizer.tokenize_str("blue 1234;")

    def masks_of(output: list[int], drafts: list[int]) -> list[list[int]]:
        history = np.array(PROMPT + output, np.int32).tobytes()
        tokens = (PROMPT + output)[-1:] + drafts
        entry = PlanEntry("a", tuple(tokens), 29, (0,), params("regex"), len(output), len(drafts), history)
        found, failures = masks.begin([entry]).get()
        assert not failures
        return [mask.tolist() for mask in found["a"]]

    one_by_one = [masks_of(text[:i], [])[0] for i in range(len(text) + 1)]
    assert len({tuple(mask) for mask in one_by_one}) > 4
    assert masks_of(text[:1], text[1:]) == one_by_one[1:]
    assert masks_of(text[:2], []) == [one_by_one[2]]
    wrong = masks_of(text[:1], [text[1], EOS, text[2]])
    assert wrong[:2] == one_by_one[1:3]


@pytest.mark.parametrize("num_right", [0, 3, 6])
def test_drafts_under_a_grammar_are_taken_as_far_as_they_are_drawn(engine: Engine, num_right: int) -> None:
    """Penalties count the drafts before each of them; those after a wrong one are forbidden, or not, to no effect."""
    request = Request("a", PROMPT, params("json", logprobs=1))
    finish(engine, request)
    known, coming = [*PROMPT, *request.output_token_ids[:2]], request.output_token_ids[2:9]
    drafts = [*coming[:num_right], *[EOS] * (6 - num_right)]
    before = PlanEntry("b", tuple(known[:-1]), 0, (1, 2, 3), None)
    engine.runner.run(Plan((before,)))
    history = np.array(known, np.int32).tobytes()
    step = PlanEntry("b", (known[-1], *drafts), len(known) - 1, (1, 2, 3), request.sampling, 2, 6, history)
    drawn = engine.runner.run(Plan((step,))).drawn["b"]
    assert drawn.token_ids == tuple(coming[: num_right + 1])
    assert [told.token_id for told in drawn.logprobs] == list(drawn.token_ids)


def test_a_request_whose_grammar_breaks_fails_alone(engine: Engine) -> None:
    broken, sound = Request("broken", PROMPT, params("json")), Request("sound", PROMPT, params("json", 3))
    broken.prompt_token_ids = [*PROMPT, 99]  # an output token that no JSON starts with
    for request in (broken, sound):
        engine.scheduler.add(request)
    broken.num_prompt_tokens = len(PROMPT)
    plan = engine.scheduler.schedule()
    result = engine.runner.run(plan)
    assert "grammar" in result.drawn["broken"].failure
    assert [output.request for output in engine.scheduler.update(plan, result)] == [sound]
    assert engine.scheduler.requests.keys() == {"sound"}
    engine.scheduler.check_integrity()
    engine.scheduler.release("sound")


def test_a_grammar_that_was_prepared_is_not_compiled_when_its_mask_is_due(tokenizer: LLTokenizer) -> None:
    """Nor is it for the requests after the first; each goes its own way through it."""
    loads: list[None] = []

    def load() -> LLTokenizer:
        loads.append(None)
        return tokenizer

    masks = GrammarMasks(load, tokenizer.vocab_size)
    masks.prepare(GRAMMARS["regex"])
    drawn = tokenizer.tokenize_str("red 123")

    def mask(name: str, output: list[int]) -> list[int]:
        history = np.array(PROMPT + output, np.int32).tobytes()
        entry = PlanEntry(name, (1,), 29, (0,), params("regex"), len(output), history=history)
        found: list[int] = masks.begin([entry]).get()[0][name][0].tolist()
        return found

    fresh = GrammarMasks(load, tokenizer.vocab_size)
    first = mask("a", [])
    assert mask("a", drawn) != first
    assert mask("b", []) == first
    assert len(loads) == 1
    masks = fresh
    assert mask("c", []) == first


def test_a_tokenizer_that_is_not_the_models_fails_the_request_and_not_the_step(tokenizer: LLTokenizer) -> None:
    def load() -> LLTokenizer:
        return LLTokenizer(str(MODEL / "tokenizer.json"), n_vocab=5)

    entry = PlanEntry("a", (5,), 0, (0,), params("regex"), history=np.array([5], np.int32).tobytes())
    assert GrammarMasks(load, 5).begin([entry]).get() == ({}, {"a": ANY})


def test_prompt_logprobs_are_the_same_in_chunks(engine: Engine) -> None:
    wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=2)
    whole = Request("whole", PROMPT, wanted)
    finish(engine, whole)
    chunked = Request("chunked", PROMPT, wanted)
    engine.scheduler.add(chunked)
    engine.scheduler._max_num_batched_tokens, budget = 7, engine.scheduler._max_num_batched_tokens
    while engine.scheduler.requests:
        engine.step()
    engine.scheduler._max_num_batched_tokens = budget
    assert len(whole.prompt_logprobs) == len(PROMPT) - 1
    assert [told.token_id for told in whole.prompt_logprobs] == PROMPT[1:]
    if library() is not None:
        assert chunked.prompt_logprobs == whole.prompt_logprobs
    for ours, theirs in zip(chunked.prompt_logprobs, whole.prompt_logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
