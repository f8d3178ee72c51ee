"""A callback for the Trainer of Hugging Face transformers.

from layerwatch.hooks.transformers import LayerwatchCallback
trainer = Trainer(model, args, train_dataset=data, callbacks=[LayerwatchCallback(run="runs/exp1")])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .session import Session, plain
from .watcher import Watcher

try:
    from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise ImportError(
        f"layerwatch.hooks.transformers needs transformers: pip install 'layerwatch[transformers]' ({error})"
    ) from None


class LayerwatchCallback(TrainerCallback):
    """Watches `Trainer.train()`, and logs what the Trainer logs.

    `loss` becomes `train_loss`, `eval_loss` becomes `val_loss`; other numbers keep their names. The training
    arguments (and those of PEFT's adapters) are the run's `config`. A training that goes on from a checkpoint
    goes on in its run, if that exists, at the checkpoint's step.

    Args:
        run, every, options: as `watch` takes them.
    """

    def __init__(self, run: str | Path | None = None, every: int | str = "auto", **options: Any) -> None:
        self._session = Session(run, every, options)

    @property
    def watcher(self) -> Watcher | None:
        """Of the latest training."""
        return self._session.watcher

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module,
        optimizer: Optimizer | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Start to watch; weights and optimizer are those of the checkpoint by now."""
        self._session.begin(model, optimizer, {**args.to_dict(), **_adapters(model)}, step=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **_: Any,
    ) -> None:  # fmt: skip
        """Losses, metrics of evaluations, and what else is reported."""
        if not state.is_world_process_zero or logs is None:
            return
        if "train_runtime" in logs:  # of the whole training, at its end: no point of the curve
            logs = {"mean_train_loss" if name == "train_loss" else name: v for name, v in logs.items()}
        self._session.guarded(self._session.log, logs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Record the checkpoint that was just saved."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self._session.saved(folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Finish the log."""
        self._session.end()


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The hyperparameters of PEFT's adapters: `peft/default/r`."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return {}
    return {
        f"peft/{adapter}/{name}": value
        for adapter, config in configs.items()
        for name, value in plain(config.to_dict()).items()
    }
