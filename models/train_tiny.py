"""Train `penstock-tiny`, the small Qwen3-MoE model that Penstock's demos and tests serve.

Everything comes from this machine: the text is the source of Python's own standard library, the tokenizer is learned
from it, and the weights are trained from scratch on the processor. One command, about forty minutes on one core of a
busy machine:

    python models/train_tiny.py
"""

from __future__ import annotations

import gzip
import json
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from tiny_data import (
    ASSISTANT,
    CHAT_TEMPLATE,
    END,
    SYSTEM,
    USER,
    batches,
    encode,
    learn_tokenizer,
    library_files,
    questions,
)
from tiny_model import Shape, TinyMoe, configuration, named_weights
from tokenizers import Tokenizer
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Settings:
    """One training run. The same settings on the same machine give the same weights."""

    out: Path = Path("models/penstock-tiny")
    shape: Shape = field(default_factory=Shape)
    steps: int = 1400
    batch: int = 6
    """Sequences in one step."""
    part: int = 3
    """Sequences whose gradient is computed at once; small parts stay in the processor's caches."""
    context: int = 512
    """Tokens in one training sequence; also the window of the held-out measure."""
    matrix_lr: float = 0.015
    vector_lr: float = 0.01
    warmup: int = 50
    short_share: float = 0.6
    """Share of the run, at its start, that sees sequences of half the context, which is faster."""
    decay_share: float = 0.6
    """Share of the run, at its end, over which the learning rate falls to zero."""
    weight_decay: float = 0.05
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
    save_every: int = 200
    threads: int = 1
    seed: int = 0


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by five Newton-Schulz steps (Jordan and others, 2024).

    Works on matrices and on stacks of them `[E, rows, columns]`.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient; `closure` is not used."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p not in self.state:
                    self.state[p] = {"memory": torch.zeros_like(p)}
                memory = self.state[p]["memory"]
                memory.lerp_(p.grad, 1 - group["momentum"])
                update = _orthogonal(p.grad.lerp(memory, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)


def _orthogonal(g: Tensor) -> Tensor:
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    result: Tensor = x.mT if tall else x
    return result


def learning_rate(step: int, settings: Settings) -> float:
    """Factor on the learning rates: linear warm-up, a plateau, a linear fall to zero."""
    remaining = (settings.steps - step) / (settings.decay_share * settings.steps)
    return min(1.0, (step + 1) / settings.warmup, remaining)


def split_parameters(model: TinyMoe) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices, which Muon trains, and the rest: norms, routers and the embedding, which Adam trains."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        adam = parameter.ndim == 1 or name == "embedding" or name.endswith("router")
        (others if adam else matrices).append(parameter)
    return matrices, others


def train(
    model: TinyMoe, data: Iterator[Tensor], settings: Settings, save: Callable[[], None]
) -> list[dict[str, float]]:
    """Run all steps, calling `save` now and then; returns the loss curve, nats for one token."""
    matrices, others = split_parameters(model)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, settings.matrix_lr, settings.weight_decay),
        torch.optim.AdamW(others, settings.vector_lr, (0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    curve: list[dict[str, float]] = []
    total, start = 0.0, time.monotonic()
    for step in range(settings.steps):
        for optimizer, base in zip(optimizers, (settings.matrix_lr, settings.vector_lr), strict=True):
            optimizer.param_groups[0]["lr"] = base * learning_rate(step, settings)
        length = settings.context // (2 if step < settings.short_share * settings.steps else 1)
        for part in torch.split(next(data), settings.part):
            total += accumulate(model, part, length, settings)
        nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - start
            curve.append({"step": step + 1, "seconds": round(seconds, 1), "loss": round(total / 50, 4)})
            print(curve[-1], flush=True)
            total = 0.0
        if (step + 1) % settings.save_every == 0:
            save()
    return curve


def accumulate(model: TinyMoe, part: Tensor, length: int, settings: Settings) -> float:
    """Add the gradient of `part [B, T + 1]`, read in pieces of `length` tokens; return its share of the loss."""
    share = len(part) / settings.batch
    logits, balance, z = model(part[:, :-1].reshape(-1, length))
    loss = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
    total = loss + settings.balance_loss * balance + settings.router_z_loss * z
    torch.autograd.backward(total * share)
    return loss.item() * share


@torch.no_grad()
def bits_per_byte(model: TinyMoe, files: list[Tensor], n_bytes: int, context: int) -> float:
    """Bits the model needs for one byte of `files`: windows of `context` tokens overlap by half."""
    nats, half = 0.0, context // 2
    for tokens in files:
        row = torch.cat([torch.zeros(1, dtype=torch.long), tokens])  # each file follows an <|endoftext|>, id 0
        for begin in range(0, max(1, len(row) - 1 - half), half):
            window = row[begin : begin + context + 1]
            logits, _, _ = model(window[None, :-1])
            fresh = 0 if begin == 0 else half
            nats += F.cross_entropy(logits[0, fresh:], window[1 + fresh :], reduction="sum").item()
    return nats / math.log(2) / n_bytes


def export(model: TinyMoe, tokenizer: Tokenizer, out: Path) -> None:
    """Write a folder that `transformers` loads: configuration, weights in bfloat16, tokenizer and chat template."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": model.shape.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    documents = {
        "config.json": configuration(model.shape),
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "tokenizer_config.json": tokenizer_config,
    }
    for name, document in documents.items():
        (out / name).write_text(json.dumps(document, indent=2) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save(str(out / "tokenizer.json"))
    partial = out / "model.safetensors.part"
    save_file(named_weights(model), partial, {"format": "pt"})
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")


@torch.no_grad()
def verify(model: TinyMoe, tokenizer: Tokenizer, text: str, out: Path) -> str:
    """Check that `transformers` computes the same logits from the folder; returns its completion of a method's start.

    Raises AssertionError where tokens or logits differ.
    """
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM

    network: Any = Qwen3MoeForCausalLM.from_pretrained(out, dtype=torch.float32)
    shell = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(text[:6000]).ids
    assert shell(text[:6000]).input_ids == ids, "the shipped tokenizer differs"
    tokens = torch.tensor(ids[:1024]).view(4, 256)
    difference = (network(tokens).logits - model(tokens)[0]).abs().max().item()
    print(f"largest logit difference from transformers: {difference:.1e}")
    assert difference < 1e-3
    prompt = torch.tensor([tokenizer.encode("def __init__(self").ids])
    torch.manual_seed(0)
    return str(shell.decode(network.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.6)[0]))


def main(settings: Settings) -> None:
    """Learn the tokenizer, train, export, measure the exported weights and write `training.json` beside them."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    texts, unseen = library_files()
    tokenizer = learn_tokenizer(texts, settings.shape.vocab)
    files = encode(tokenizer, [text + END for text in texts])
    chats = encode(tokenizer, [chat for text in texts for chat in questions(text)])

    model = TinyMoe(settings.shape)
    export(model, tokenizer, settings.out)
    start = time.monotonic()
    data = batches(files, chats, settings.batch, settings.context + 1, settings.seed)
    curve = train(model, data, settings, lambda: export(model, tokenizer, settings.out))
    seconds = time.monotonic() - start
    export(model, tokenizer, settings.out)

    for parameter in model.parameters():  # what ships is rounded, so that is what is measured
        parameter.data = parameter.data.bfloat16().float()
    raw = [text.encode() for text in unseen]
    n_bytes = sum(map(len, raw))
    held_out = encode(tokenizer, [text + END for text in unseen])
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": sysconfig.get_config_var("py_version"),
        "training_files": len(texts),
        "training_bytes": sum(len(text.encode()) for text in texts),
        "training_tokens": sum(map(len, files)) + sum(map(len, chats)),
        "tokens_seen": settings.steps * settings.batch * settings.context,
        "training_seconds": round(seconds),
        "held_out_files": len(raw),
        "held_out_bytes": n_bytes,
        "held_out_tokens": sum(map(len, held_out)),
        "held_out_bits_per_byte": round(bits_per_byte(model, held_out, n_bytes, settings.context), 4),
        "gzip_bits_per_byte": round(8 * sum(len(gzip.compress(r, 9)) for r in raw) / n_bytes, 4),
        "sample": verify(model, tokenizer, max(unseen, key=len), settings.out),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "curve": curve,
    }
    (settings.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
