"""Sequences, fine-tuning and trainings whose loss need not fall."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import case
from .made import table, tokens
from .networks import mlp
from .plain import fit

# ---- sequences


class Block(nn.Module):
    def __init__(self, dim: int, post: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.ln1, self.ln2, self.post = nn.LayerNorm(dim), nn.LayerNorm(dim), post

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = x if self.post else self.ln1(x)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        x = self.ln1(x) if self.post else x
        x = x + self.down(F.gelu(self.up(x if self.post else self.ln2(x))))
        return self.ln2(x) if self.post else x


class Transformer(nn.Module):
    def __init__(self, vocab: int, dim: int = 32, depth: int = 2, tied: bool = False, post: bool = False):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, dim), nn.Parameter(0.02 * torch.randn(24, dim))
        self.blocks = nn.ModuleList(Block(dim, post) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        x = self.token(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


@case("transformer")
@case("transformer-tied", tied=True)
@case("transformer-post-norm", post=True)
@case("transformer-deep", depth=6, steps=150)
@case("transformer-bfloat16-autocast", autocast=True)
@case("transformer-rate-x100", "learning_rate_too_high", "not_learning", "weight_growth", lr=0.3)
def train_transformer(
    attach: Callable,
    seed: int,
    *,
    tied: bool = False,
    post: bool = False,
    depth: int = 2,
    lr: float = 3e-3,
    steps: int = 250,
    autocast: bool = False,
) -> None:
    x = tokens(2000, 24)
    model = Transformer(40, depth=depth, tied=tied, post=post)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 20) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))
    )

    def loss_of(i: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(x[i, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), x[i, 1:].flatten())

    fit(
        attach,
        model,
        optimizer,
        loss_of,
        1700,
        steps,
        16,
        seed,
        scheduler,
        clip=1.0,
        val_of=lambda: loss_of(torch.arange(1700, 2000)),
    )


@case("lstm-classifier")
@case("gru-classifier", cell="GRU")
def train_recurrent(attach: Callable, seed: int, *, cell: str = "LSTM") -> None:
    x = tokens(2000, 20)
    y = (x[:, :6] < 4).sum(1).clamp(max=4)
    model = nn.ModuleDict(
        {
            "token": nn.Embedding(40, 16),
            "rnn": getattr(nn, cell)(16, 32, batch_first=True),
            "head": nn.Linear(32, 5),
        }
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    fit(
        attach,
        model,
        optimizer,
        lambda i: F.cross_entropy(model["head"](model["rnn"](model["token"](x[i]))[0][:, -1]), y[i]),
        2000,
        400,
        seed=seed,
        clip=1.0,
    )


class LowRank(nn.Module):
    """A frozen linear layer with a trainable low-rank addition; B starts at zero (LoRA)."""

    def __init__(self, base: nn.Linear, rank: int = 4):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.lora_A.T @ self.lora_B.T


@case("finetune-lora", lora=True)
@case("finetune-full")
@case("finetune-far", "excessive_drift", "learning_rate_too_high", "dead_units", lr=0.05)
def train_finetune(attach: Callable, seed: int, *, lora: bool = False, lr: float = 5e-4) -> None:
    x, y = table(6)
    model = mlp(20, 64, 64, 64, 6)
    first = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):  # the pretraining, unwatched
        i = torch.randint(0, 1500, (64,))
        first.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        first.step()
    model[-1] = nn.Linear(64, 3)
    if lora:
        for at in (0, 2, 4):
            model[at] = LowRank(model[at])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3 if lora else lr)
    fit(attach, model, optimizer, lambda i: F.cross_entropy(model(x[i]), y[i] % 3), 12000, 250, seed=seed)


@case("policy-gradient")
def train_policy(attach: Callable, seed: int) -> None:
    """REINFORCE on a contextual bandit: the loss changes sign and means nothing."""
    x, y = table(4)
    model = mlp(20, 32, 4, act=nn.Tanh)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(i: Tensor) -> Tensor:
        chosen = torch.distributions.Categorical(logits=model(x[i]))
        action = chosen.sample()
        reward = (action == y[i]).float()
        return -((reward - reward.mean()) * chosen.log_prob(action)).mean()

    fit(attach, model, optimizer, loss_of, 3000, 400, 64, seed)


@case("q-learning-target-network")
def train_q(attach: Callable, seed: int) -> None:
    """Fitted values against a slow copy of the network: targets move, so the loss need not fall."""
    x, y = table(4)
    model = nn.ModuleDict({"online": mlp(20, 32, 4), "target": mlp(20, 32, 4)})
    optimizer = torch.optim.Adam(model["online"].parameters(), lr=2e-3)

    def edit(step: int) -> None:
        if step % 50 == 0:
            model["target"].load_state_dict(model["online"].state_dict())

    def loss_of(i: Tensor) -> Tensor:
        action = torch.randint(0, 4, (len(i),))
        with torch.no_grad():
            goal = (action == y[i]).float() + 0.8 * model["target"](x[(i + 1) % len(x)]).max(1).values
        return F.smooth_l1_loss(model["online"](x[i])[torch.arange(len(i)), action], goal)

    fit(attach, model, optimizer, loss_of, 3000, 500, 64, seed, edit=edit)


@case("mixture-of-experts")
def train_experts(attach: Callable, seed: int) -> None:
    x, y = table(6)
    model = nn.ModuleDict(
        {"gate": nn.Linear(20, 4), "experts": nn.ModuleList(mlp(20, 32, 6) for _ in range(4))}
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def loss_of(i: Tensor) -> Tensor:
        weight, chosen = F.softmax(model["gate"](x[i]), 1).max(1)
        out = torch.zeros(len(i), 6)
        for k, expert in enumerate(model["experts"]):
            here = chosen == k
            if here.any():
                out[here] = expert(x[i][here]) * weight[here, None]
        return F.cross_entropy(out, y[i])

    fit(attach, model, optimizer, loss_of, 3000, 400, 16, seed)


@case("lbfgs")
def train_lbfgs(attach: Callable, seed: int) -> None:
    x, y = table(1)
    model = mlp(20, 16, 1, act=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    watcher = attach(model, optimizer)
    for _ in range(60):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            return loss

        watcher.log(train_loss=optimizer.step(closure))  # type: ignore[arg-type]
    watcher.close()
