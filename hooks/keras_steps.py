"""The optimizers of Keras on the torch backend, as torch optimizers that torch's hooks can follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .keras_view import in_torch_order, variables_of


class Stand(Optimizer):
    """Stands for a Keras optimizer: a step of it is one that Keras makes, on the view's parameters."""

    def __init__(self, keras_optimizer: Any, view: nn.Module) -> None:
        self._keras, self._view = keras_optimizer, view
        self._places: dict[int, tuple[nn.Parameter, str]] = {}  # of the variables: parameter, class of layer
        #: Steps so far.
        self.made = int(_value(keras_optimizer.iterations))
        self._count = torch.tensor(float(self.made))
        parameters = [p for _, p, _ in variables_of(view).values() if p.requires_grad]
        super().__init__(parameters, {"lr": self._rate()})
        if keras_optimizer.built:
            self.own(keras_optimizer._trainable_variables)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        """Keras makes the step in `closure`."""
        return closure()

    def own(self, variables: Sequence[Any]) -> None:
        """These are the variables that Keras gives to its optimizer."""
        found = variables_of(self._view)
        self._places = {id(v): found[id(v)][1:] for v in variables if id(v) in found}
        self.param_groups[0]["params"] = [parameter for parameter, _ in self._places.values()]
        self._show_moments()

    def _show_moments(self) -> None:
        """Those of Adam and its relatives, where torch keeps them."""
        keras = self._keras
        lists = [getattr(keras, name, None) for name in ("_momentums", "_velocities")]
        if None in lists or not hasattr(keras, "beta_2"):
            return
        self.param_groups[0] |= {"betas": (keras.beta_1, keras.beta_2), "eps": keras.epsilon}
        for variable, *moments in zip(keras._trainable_variables, *lists, strict=True):
            if id(variable) in self._places and None not in moments:
                parameter, kind = self._places[id(variable)]
                first, second = (in_torch_order(m.value.detach(), kind, variable.name) for m in moments)
                self.state[parameter] = {"exp_avg": first, "exp_avg_sq": second, "step": self._count}

    def _rate(self) -> float | Tensor:
        value = _value(self._keras.learning_rate)
        if isinstance(value, Tensor) and not value.is_cpu:
            return value.detach()
        return float(value)

    def show(self, gradients: Sequence[Tensor | None], variables: Sequence[Any]) -> None:
        """Put these gradients where the hooks look for them: a step follows."""
        if not self._places:
            self.own(variables)
        self.param_groups[0]["lr"] = self._rate()
        self.made += 1
        self._count.fill_(self.made)
        for gradient, variable in zip(gradients, variables, strict=True):
            if gradient is not None and id(variable) in self._places:
                parameter, kind = self._places[id(variable)]
                parameter.grad = in_torch_order(gradient.detach(), kind, variable.name).to(parameter.dtype)

    def forget(self) -> None:
        """The step is made: the gradients are Keras's alone."""
        self.zero_grad()
        if not self.state:
            self._show_moments()


def _value(number: Any) -> Any:
    """A number, or that in a variable: Keras converts its variables by way of numpy, which warns."""
    return getattr(number, "value", number)


class Steps:
    """Makes every update of a Keras optimizer a step of its `stand`, until `detach`.

    Args:
        optimizer: as the model keeps it. view: of the model.
        guarded: calls a function of ours so that no error of it reaches the training.
    """

    def __init__(self, optimizer: Any, view: nn.Module, guarded: Callable[..., None]) -> None:
        self._outer, self._guarded = optimizer, guarded
        self._inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a loss scaler
        self.stand: Stand = type("Keras" + type(self._inner).__name__, (Stand,), {})(self._inner, view)
        self._reached = False  # the inner optimizer was called by the loss scaler
        self._updated = False
        #: Micro-batches of a step.
        self.parts = self._inner.gradient_accumulation_steps or 1

    def attach(self) -> None:
        """Wrap `apply` of these objects: of no other ones, and nothing in Keras itself."""
        vars(self._inner)["apply"] = self._followed(self._inner.apply)
        if self._outer is not self._inner:
            vars(self._outer)["apply"] = self._scaled(self._outer.apply)

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        for optimizer in (self._inner, self._outer):
            vars(optimizer).pop("apply", None)

    def take_updated(self) -> bool:
        """Has there been an update since the last call?"""
        updated, self._updated = self._updated, False
        return updated

    def unscaled(self, loss: float | Tensor) -> float | Tensor:
        """A loss as it was before `scale_loss`."""
        if self._outer is self._inner:
            return loss / (self._inner.loss_scale_factor or 1.0)
        scale = self._outer.dynamic_scale.value.detach() if self._outer.built else self._outer.initial_scale
        return loss / scale

    def batch_ended(self) -> None:
        """Of a step that is compiled whole: the gradients are left where backward put them."""
        variables = self._inner._trainable_variables
        self._show([v.value.grad for v in variables], variables)
        self.stand.step(lambda: None)
        self.stand.forget()
        self._updated = True

    def _followed(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def followed(grads: Any, trainable_variables: Any = None) -> Any:
            self._reached = True
            if torch.compiler.is_compiling() or not self._is_update():
                return apply(grads, trainable_variables)
            self._guarded(self._show, grads, trainable_variables)
            result = self.stand.step(lambda: apply(grads, trainable_variables))
            self._guarded(self.stand.forget)
            self._updated = True
            return result

        return followed

    def _scaled(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def scaled(grads: Any, trainable_variables: Any = None) -> Any:
            self._reached = False
            result = apply(grads, trainable_variables)
            if not self._reached and not torch.compiler.is_compiling():
                self._guarded(self._skip)
            return result

        return scaled

    def _is_update(self) -> bool:
        return self.parts == 1 or (int(_value(self._inner._iterations)) + 1) % self.parts == 0

    def _show(self, grads: Any, trainable_variables: Any) -> None:
        """The gradients as the update uses them, before Keras clips them: unscaled, of all micro-batches."""
        keras = self._inner
        variables = list(keras._trainable_variables if trainable_variables is None else trainable_variables)
        factor = 1.0 / (keras.loss_scale_factor or 1.0)
        gradients = [g if g is None or factor == 1.0 else g * factor for g in grads]
        if self.parts > 1:
            sums = [keras._accumulated_gradients[keras._get_variable_index(v)].value for v in variables]
            gradients = [
                None if g is None else (g + s) / self.parts for g, s in zip(gradients, sums, strict=True)
            ]
        self.stand.show(gradients, variables)

    def _skip(self) -> None:
        """The loss scaler let no update happen: a step that changes nothing, and is marked."""
        self._updated = True
        self.stand.found_inf = torch.ones(())  # type: ignore[attr-defined]
        try:
            self.stand.step(lambda: None)
        finally:
            del self.stand.found_inf  # type: ignore[attr-defined]
