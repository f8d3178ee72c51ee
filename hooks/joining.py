"""Frameworks that are training in this process: their trainers get our callback, as if it had been given."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any


def join(options: Mapping[str, Any]) -> Any:
    """The callback, which watches by now, of a trainer that is in the middle of a step; None: there is none.

    Args:
        options: of the callback.
    """
    kinds = {
        kind: give
        for module, name, give in _TRAINERS
        if (kind := getattr(sys.modules.get(module), name, None)) is not None
    }
    if not kinds:
        return None
    for trainer in [o for o in gc.get_objects() if issubclass(type(o), tuple(kinds))]:
        give = next(give for kind, give in kinds.items() if isinstance(trainer, kind))
        callback = give(trainer, options)
        if callback is not None:
            return callback
    return None


def _transformers(trainer: Any, options: Mapping[str, Any]) -> Any:
    if not getattr(trainer, "is_in_train", False):
        return None
    from .transformers import LayerwatchCallback

    callback = LayerwatchCallback(**options)
    model, optimizer = trainer.model, trainer.optimizer
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model, optimizer=optimizer)
    trainer.callback_handler.callbacks.insert(
        1, callback
    )  # behind the Trainer's flow; others take numbers out
    return callback


def _lightning(trainer: Any, options: Mapping[str, Any]) -> Any:
    if not trainer.training:
        return None
    from .lightning import LayerwatchCallback

    callback = LayerwatchCallback(**options)
    callback.state_dict = dict  # type: ignore[method-assign]  # checkpoints stay those of the program
    callback.on_train_start(trainer, trainer.lightning_module)
    trainer.callbacks.append(callback)
    return callback


def _keras(callbacks: Any, options: Mapping[str, Any]) -> Any:
    if not getattr(callbacks, "_in_begin_end_block_count", 1) or callbacks.model is None:
        return None
    from .keras import LayerwatchCallback

    callback = LayerwatchCallback(**options)
    callback.set_model(callbacks.model)
    callback.set_params(callbacks.params)
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callbacks.callbacks.append(callback)
    callbacks._async_train = False  # without callbacks of the user's Keras calls them from a thread
    return callback


#: Module, class, and what gives such an object a callback if it is training.
_TRAINERS: tuple[tuple[str, str, Callable[[Any, Mapping[str, Any]], Any]], ...] = (
    ("transformers.trainer", "Trainer", _transformers),
    ("lightning.pytorch", "Trainer", _lightning),
    ("pytorch_lightning", "Trainer", _lightning),
    ("keras.src.callbacks.callback_list", "CallbackList", _keras),
)
