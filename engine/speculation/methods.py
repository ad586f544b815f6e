"""The proposer that a configuration asks for."""

from __future__ import annotations

from engine.config import SpeculativeConfig
from engine.speculation.ngram import NgramProposer
from engine.speculation.proposer import Proposer
from engine.speculation.recycling import RecyclingProposer
from engine.speculation.shared_ngrams import SharedNgramProposer
from engine.speculation.speculator import Speculator


def make_speculator(config: SpeculativeConfig) -> Speculator | None:
    """None where nothing is to be guessed."""
    proposer: Proposer
    match config.method:
        case "ngram":
            proposer = NgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
        case "suffix":
            proposer = SharedNgramProposer(config.prompt_lookup_min, config.prompt_lookup_max)
        case "token_recycling":
            proposer = RecyclingProposer()
        case _:
            return None
    return Speculator(proposer, config.num_speculative_tokens)
