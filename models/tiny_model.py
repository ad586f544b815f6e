"""The network of `penstock-tiny`: Qwen3-MoE with tied embeddings, laid out for fast training on a processor.

Shapes: `B` sequences, `T` tokens, `N = B * T`, `H` query heads, `K` key/value heads, `D` head size, `C` hidden size,
`E` experts, `I` expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network; the defaults give 4.6 million parameters, 1.9 million of them used by each token."""

    vocab: int = 3072
    hidden: int = 192
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 8
    top_k: int = 2
    expert_width: int = 128
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


class _Permute(torch.autograd.Function):
    """`x[order]` whose gradient is a gather through the inverse order: far faster on a processor than scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class Experts(nn.Module):
    """The expert layer: each token runs through its `top_k` experts, weighted by the renormalised router."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = nn.Parameter(torch.randn(shape.experts, shape.hidden) * 0.02)
        self.gate = _matrix(shape.experts, shape.expert_width, shape.hidden)
        self.up = _matrix(shape.experts, shape.expert_width, shape.hidden)
        self.down = nn.Parameter(torch.zeros(shape.experts, shape.hidden, shape.expert_width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `x [N, C]` to `(y [N, C], balance loss, router z-loss)`; no token is ever dropped."""
        logits = F.linear(x, self.router)
        probs = logits.softmax(-1)
        weights, chosen = probs.topk(self.top_k)
        weights = weights / weights.sum(-1, keepdim=True)

        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = chosen.flatten().bincount(minlength=len(self.router))
        copies = x[:, None].expand(-1, self.top_k, -1).reshape(-1, x.shape[1])
        groups = _Permute.apply(copies, order, inverse).split(counts.tolist())  # type: ignore[no-untyped-call]
        banks = zip(groups, self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        out = torch.cat([F.linear(F.silu(F.linear(g, gate)) * F.linear(g, up), down) for g, gate, up, down in banks])
        out = _Permute.apply(out, inverse, order).view(-1, self.top_k, x.shape[1])  # type: ignore[no-untyped-call]

        share = counts / counts.sum()
        balance = len(self.router) * (share * probs.mean(0)).sum()
        return (out * weights[..., None]).sum(1), balance, logits.logsumexp(-1).square().mean()


class Attention(nn.Module):
    """Causal grouped-query attention with normalised queries and keys and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q = _matrix(shape.heads * shape.head_dim, shape.hidden)
        self.k = _matrix(shape.kv_heads * shape.head_dim, shape.hidden)
        self.v = _matrix(shape.kv_heads * shape.head_dim, shape.hidden)
        self.o = nn.Parameter(torch.zeros(shape.hidden, shape.heads * shape.head_dim))
        self.q_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps)
        self.k_norm = nn.RMSNorm(shape.head_dim, shape.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within `x [B, T, C]`; `cos` and `sin` are `[T, D]`."""
        batch, time_, _ = x.shape
        q, k, v = (F.linear(x, w).view(batch, time_, -1, self.shape.head_dim) for w in (self.q, self.k, self.v))
        q = _rotate(self.q_norm(q).transpose(1, 2), cos, sin)
        k = _rotate(self.k_norm(k).transpose(1, 2), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return F.linear(y.transpose(1, 2).reshape(batch, time_, -1), self.o)


class Layer(nn.Module):
    """Attention, then experts, each on the normalised residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.attention = Attention(shape)
        self.experts_norm = nn.RMSNorm(shape.hidden, shape.norm_eps)
        self.experts = Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `x [B, T, C]` to `(x, balance loss, router z-loss)`."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y, balance, z = self.experts(self.experts_norm(x).flatten(0, 1))
        return x + y.view_as(x), balance, z


class TinyMoe(nn.Module):
    """The Qwen3-MoE network with tied embeddings, laid out for fast training on a processor."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.vocab, shape.hidden) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, shape.norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map `tokens [B, T]` to `(logits [B, T, vocab], balance loss, router z-loss)`, losses averaged over layers."""
        frequency = self.shape.rope_theta ** (-torch.arange(0, self.shape.head_dim, 2) / self.shape.head_dim)
        angles = torch.arange(tokens.shape[1])[:, None] * torch.cat([frequency, frequency])
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(tokens, self.embedding)
        losses = torch.zeros(2)
        for layer in self.layers:
            x, balance, z = layer(x, cos, sin)
            losses = losses + torch.stack([balance, z]) / len(self.layers)
        return F.linear(self.norm(x), self.embedding), losses[0], losses[1]


def _matrix(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*size) * 0.5 / math.sqrt(size[-1]))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def named_weights(model: TinyMoe) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names that Qwen3-MoE checkpoints have on disk."""
    names = {"model.embed_tokens": model.embedding, "model.norm": model.norm.weight}
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        at, attention, experts = f"model.layers.{i}", layer.attention, layer.experts
        names[f"{at}.input_layernorm"] = layer.attention_norm.weight
        names[f"{at}.post_attention_layernorm"] = layer.experts_norm.weight
        names[f"{at}.self_attn.q_norm"] = attention.q_norm.weight
        names[f"{at}.self_attn.k_norm"] = attention.k_norm.weight
        for letter in "qkvo":
            names[f"{at}.self_attn.{letter}_proj"] = getattr(attention, letter)
        names[f"{at}.mlp.gate"] = experts.router
        for part in ("gate", "up", "down"):
            for e, matrix in enumerate(getattr(experts, part).unbind()):
                names[f"{at}.mlp.experts.{e}.{part}_proj"] = matrix
    return {f"{name}.weight": tensor.detach().bfloat16().contiguous() for name, tensor in names.items()}


def configuration(shape: Shape) -> dict[str, Any]:
    """The `config.json` of this shape, readable by old and new readers (both spellings of the rotary base)."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "hidden_act": "silu",
        "intermediate_size": shape.expert_width * shape.top_k,
        "moe_intermediate_size": shape.expert_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": shape.max_positions,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
