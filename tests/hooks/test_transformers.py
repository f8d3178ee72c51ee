"""The callback for the Trainer of Hugging Face: its log equals that of a plain loop over the same batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.nn.utils.clip_grad import clip_grad_norm_
from trainings import assert_same_numbers, failures, weights_of
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from layerwatch import Run, watch
from layerwatch.hooks.transformers import LayerwatchCallback

pytestmark = [
    # transformers renames its options, and peft still asks for the old names
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

STEPS = 4
Batch = dict[str, Tensor]


def language_model(dropout: float = 0.0) -> LlamaForCausalLM:
    """Two blocks, tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attention_dropout=dropout, tie_word_embeddings=True, pad_token_id=None,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sentences(count: int = 40) -> list[Batch]:
    tokens = torch.randint(0, 24, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Stack:
    """Collates, and remembers the batches in the order in which the Trainer gets them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, rows: list[Batch]) -> Batch:
        self.batches.append({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        return dict(self.batches[-1])


def arguments(path: Path, **how: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(path / "out"), use_cpu=True, **{**usual, **how})


def trainer(model: nn.Module, path: Path, *callbacks: Any, **how: Any) -> Trainer:
    data = {"train_dataset": sentences(), "eval_dataset": sentences(8), "data_collator": Stack()}
    return Trainer(model, arguments(path, **how), callbacks=list(callbacks), **data)  # type: ignore[arg-type]


def trained(path: Path, model: nn.Module | None = None, **how: Any) -> tuple[Run, Trainer]:
    """Under watch, at every step."""
    callback = LayerwatchCallback(run=path / "run", every=1)
    training = trainer(model or language_model(), path, callback, **how)
    training.train()
    assert callback.watcher is not None
    assert failures(callback.watcher) == ""
    return Run(path / "run"), training


def raw(
    path: Path, batches: list[Batch], model: nn.Module | None = None, *, accumulate: int = 1,
    fused: bool = True, clip: float = 1.0, context: Callable[[], Any] = nullcontext, steps: int = STEPS,
) -> tuple[Run, nn.Module]:  # fmt: skip
    """What the Trainer does, as a plain loop under `watch`."""
    model = model or language_model()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2, weight_decay=0.0, fused=fused)
    with watch(model, optimizer, run=path / "raw", every=1) as watcher:
        for step in range(steps):
            group = batches[step * accumulate : (step + 1) * accumulate]
            count = sum(batch["labels"][..., 1:].numel() for batch in group)
            total = 0.0
            for batch in group:
                with context():
                    loss = model(**batch, num_items_in_batch=torch.tensor(count)).loss
                loss.backward()
                total += loss.item()
            clip_grad_norm_(parameters, clip)
            optimizer.step()
            model.zero_grad()
            watcher.log(train_loss=total)
    return Run(path / "raw"), model


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    one, other = weights_of(a), weights_of(b)
    assert list(one) == list(other)
    for name, weight in one.items():
        assert weight.equal(other[name]), name


HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it comes": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "bf16": ({"bf16": True}, {"context": lambda: autocast("cpu", dtype=torch.bfloat16)}),
    "AdamW that is not fused": ({"optim": "adamw_torch"}, {"fused": False}),
    "clipping": ({"max_grad_norm": 0.1}, {"clip": 0.1}),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}),
}


@pytest.mark.parametrize("how", HOW)
def test_the_log_is_that_of_a_plain_loop(tmp_path: Path, how: str) -> None:
    arguments, loop = HOW[how]
    run, training = trained(tmp_path, **arguments)
    plain, model = raw(tmp_path, training.data_collator.batches, **loop)  # type: ignore[attr-defined]
    assert_same_weights(training.model, model)  # type: ignore[arg-type]
    assert_same_numbers(run, plain)
    assert run.scalars("train_loss")["step"].tolist() == list(range(STEPS))
    losses = plain.scalars("train_loss")["value"].tolist()
    assert run.scalars("train_loss")["value"].tolist() == pytest.approx(losses, rel=1e-6)
