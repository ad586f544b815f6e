"""Rules of which layers are of which kind, as families state them over the fields of config.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from engine.json_fields import Fields

LayerType = Literal["full_attention", "sliding_attention"]
LayerTypes = Callable[[Fields, int], tuple[LayerType, ...]]
"""The type of each of so many layers."""


def all_full(_fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    return _all("full_attention", num_layers)


def _all(kind: LayerType, num_layers: int) -> tuple[LayerType, ...]:
    return (kind,) * num_layers


def sliding_when_set(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    """All layers have a window where `sliding_window` is set."""
    return _all("full_attention" if fields.get("sliding_window") is None else "sliding_attention", num_layers)


def sliding_when_switched_on(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    """All layers have a window where `use_sliding_window` is true, too."""
    rule = sliding_when_set if fields.boolean("use_sliding_window") else all_full
    return rule(fields, num_layers)


def sliding_in_upper_layers(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    """Where `use_sliding_window` is true, the layers that `layer_types` names, or those from `max_window_layers` on."""
    switched_on = sliding_when_switched_on(fields, num_layers)
    if fields.get("layer_types") is not None:
        return tuple(
            "full_attention" if kind == "full_attention" else switched_on[layer]
            for layer, kind in enumerate(_named(fields, num_layers))
        )
    first = fields.integer("max_window_layers", default=28, minimum=0)
    return (*all_full(fields, min(first, num_layers)), *switched_on[first:])


def every_nth_full(default: int, key: str = "sliding_window_pattern") -> LayerTypes:
    """The layers that `layer_types` names, else all but every n-th have a window; config.json may give n at `key`."""

    def rule(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
        if fields.get("sliding_window") is None:
            return all_full(fields, num_layers)
        if fields.get("layer_types") is not None:
            return _named(fields, num_layers)
        n = fields.integer(key, default=default)
        return tuple("sliding_attention" if (i + 1) % n else "full_attention" for i in range(num_layers))

    return rule


def _named(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    kinds = fields.get("layer_types")
    known: dict[str, LayerType] = {"full_attention": "full_attention", "sliding_attention": "sliding_attention"}
    if not isinstance(kinds, list) or len(kinds) < num_layers or any(kind not in known for kind in kinds):
        raise fields.error("layer_types", f"must name one of {', '.join(known)} for each of {num_layers} layers")
    return tuple(known[kind] for kind in kinds[:num_layers])


def every_layer(_fields: Fields, num_layers: int) -> frozenset[int]:
    return frozenset(range(num_layers))


def by_sparse_step(fields: Fields, num_layers: int) -> frozenset[int]:
    """Every `decoder_sparse_step`-th layer, but for `mlp_only_layers`."""
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers")
    return frozenset(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense)


def after_first_dense(fields: Fields, num_layers: int) -> frozenset[int]:
    """From layer `first_k_dense_replace` on."""
    return frozenset(range(fields.integer("first_k_dense_replace", default=0, minimum=0), num_layers))
