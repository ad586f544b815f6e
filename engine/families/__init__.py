"""The supported model families: one short description each."""

from collections.abc import Mapping
from types import MappingProxyType

from engine.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from engine.families.family import Family
from engine.families.gemma import GEMMA2, GEMMA3
from engine.families.gpt_oss import GPT_OSS
from engine.families.llama import LLAMA
from engine.families.mistral import MISTRAL, MIXTRAL
from engine.families.olmoe import OLMOE
from engine.families.phi import PHI3
from engine.families.qwen import QWEN2, QWEN3, QWEN3_MOE

_ALL = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.architecture: family for family in _ALL})
"""By the name that stands in `architectures` of config.json."""
