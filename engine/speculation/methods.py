"""The proposer that a configuration asks for."""

from __future__ import annotations

import dataclasses

from core.errors import ConfigError
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.kv_storage import KVStorage
from engine.loading import LoadedModel, load_model
from engine.runner import Runner
from engine.speculation.draft_model import DraftModelProposer
from engine.speculation.ngram import NgramProposer
from engine.speculation.proposer import Proposer
from engine.speculation.recycling import RecyclingProposer
from engine.speculation.shared_ngrams import SharedNgramProposer
from engine.speculation.speculator import Speculator


def load_draft_model(config: EngineConfig, vocab_size: int) -> LoadedModel | None:
    """The smaller model of method draft_model. Raises `CheckpointError`; `ConfigError` where vocabularies differ."""
    path = config.speculative_config.model
    if path is None:
        return None
    loaded = load_model(path, dataclasses.replace(config, max_model_len=None))
    if loaded.config.vocab_size != vocab_size:
        fix = f"has {loaded.config.vocab_size} tokens, must have the {vocab_size} of the model it guesses for"
        raise ConfigError("engine.speculative_config.model", path, fix)
    return loaded


def make_speculator(config: EngineConfig, draft: LoadedModel | None, num_blocks: int) -> Speculator | None:
    """None where nothing is to be guessed. `draft` gets as many KV blocks as the model it guesses for."""
    speculation = config.speculative_config
    proposer: Proposer
    match speculation.method:
        case "ngram":
            proposer = NgramProposer(speculation.prompt_lookup_min, speculation.prompt_lookup_max)
        case "suffix":
            proposer = SharedNgramProposer(speculation.prompt_lookup_min, speculation.prompt_lookup_max)
        case "token_recycling":
            proposer = RecyclingProposer()
        case "draft_model":
            assert draft is not None, "method draft_model without a model"
            runner = Runner(draft.model, KVStorage(draft.layout, num_blocks, draft.device))
            pool = BlockPool(num_blocks, config.block_size)
            proposer = DraftModelProposer(runner, pool, draft.max_model_len, config.max_num_batched_tokens)
        case None:
            return None
    return Speculator(proposer, speculation.num_speculative_tokens)
