"""What the log knows of one layer: which names there are, what belongs together, its facts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from ...monitor import Run
from ..queries import Judgement
from ..text import integer, number

#: The facts of a layer, in their order: key -> word.
FACTS = {
    "role": "Role",
    "shape": "Shape",
    "elements": "Elements",
    "fan": "Fan in / out",
    "dtype": "Type",
    "state": "State",
    "depth": "Depth",
    "start": "Initial std",
    "norm": "Norm",
    "mean": "Mean",
    "std": "Std",
    "bad": "NaN or infinite",
    "tied": "Tied to",
}
SMALL = ("bias", "norm_bias", "norm_gain", "scalar")
WEIGHTED = ("matrix", "conv", "output", "lora_a", "lora_b")
STORED = 1024  # elements of a tensor whose values are in the log


def attention_names(run: Run) -> list[str]:
    """Modules whose attention was captured."""
    kinds = set(run.kinds())
    found = [
        name for kind in ("attention_entropy", "attention_logit") if kind in kinds for name in run.names(kind)
    ]
    return list(dict.fromkeys(found))


def module_names(run: Run) -> list[str]:
    """Modules whose outputs were captured."""
    return run.names("activation") if "activation" in run.kinds() else []


def selectable(run: Run) -> list[str]:
    """Everything the selector offers, in its order: tensors, outputs of modules, attention."""
    names = [*run.tensors()["tensor"].tolist(), *module_names(run), *attention_names(run)]
    return list(dict.fromkeys(names))


def worst(run: Run, judged: Judgement | None) -> str:
    """The first layer of the worst finding; without one the first matrix that is trained."""
    names = selectable(run)
    known = set(names)
    for finding in [*(judged.alarms if judged else []), *(judged.findings if judged else [])]:
        for layer in finding.layers:
            if layer in known:
                return layer
    tensors = run.tensors()
    matrices = tensors[tensors["role"].isin(["matrix", "conv", "output", "embedding"])]
    trained = matrices.loc[matrices["trainable"].astype(bool), "tensor"].tolist()
    return next(iter([*trained, *matrices["tensor"], *names]), "")


def entry(run: Run, name: str) -> pd.Series | None:
    """The row of a tensor in `run.tensors()`; None for what is none."""
    rows = run.tensors()
    rows = rows[rows["tensor"] == name]
    return None if rows.empty else rows.iloc[0]


def module_of(run: Run, name: str) -> str:
    """The module whose output belongs to a tensor, or the name itself when it is a module; "" for neither."""
    row = entry(run, name)
    if row is None:
        return name
    return row["module"] if isinstance(row["module"], str) else ""


def bias_of(run: Run, name: str) -> str:
    """The small tensor whose values are shown with `name`: itself, or the bias of its module; "" for none."""
    row = entry(run, name)
    if row is None:
        return ""
    if row["role"] in SMALL:
        return name if row["elements"] <= STORED else ""
    sister = name.rsplit(".", 1)[0] + ".bias" if "." in name else "bias"
    beside = entry(run, sister)
    if beside is not None:
        return sister if beside["elements"] <= STORED else ""
    return name if row["elements"] <= STORED else ""


def attention_of(run: Run, name: str) -> str:
    """The attention that a tensor or module is, or is a part of; "" for none."""
    module = module_of(run, name)
    inside = [owner for owner in attention_names(run) if module == owner or module.startswith(owner + ".")]
    return max(inside, key=len, default="")


def fans(shape: list[int], module_type: str) -> tuple[int, int] | None:
    """How many inputs an output of a weight has, and how many outputs an input (as torch.nn.init counts)."""
    if len(shape) < 2:
        return None
    receptive = math.prod(shape[2:])
    outputs, inputs = int(shape[0]) * receptive, int(shape[1]) * receptive
    return (outputs, inputs) if module_type == "Conv1D" else (inputs, outputs)  # that one is transposed


def expectations(inputs: int, outputs: int) -> tuple[float, float]:
    """Standard deviations that Glorot and Bengio (2010) and He et al. (2015) start a weight with."""
    return math.sqrt(2 / (inputs + outputs)), math.sqrt(2 / inputs)


def facts(run: Run, name: str) -> dict[str, str]:
    """Keys of FACTS and what is known; what does not apply is not there."""
    row = entry(run, name)
    if row is None:
        return _module_facts(run, name)
    shape = [int(n) for n in row["shape"]]
    known = {
        "role": str(row["role"]).replace("_", " "),
        "shape": " × ".join(f"{n:,}" for n in shape) or "scalar",
        "elements": integer(row["elements"]),
        "dtype": str(row["dtype"]).removeprefix("torch."),
        "state": str(row["state"]).replace("_", " ") if isinstance(row["state"], str) else "",
        "depth": _depth(run.tensors(), name, "tensor"),
        "tied": ", ".join(n for n in row["names"] if n != name)
        if isinstance(row["names"], list | tuple)
        else "",
    }
    fan = fans(shape, str(row["module_type"]))
    if fan and row["role"] in WEIGHTED:
        known["fan"] = f"{integer(fan[0])} / {integer(fan[1])}"
    return {
        key: text
        for key, text in (known | _numbers(run, name, fan if "fan" in known else None)).items()
        if text
    }


def _numbers(run: Run, name: str, fan: tuple[int, int] | None) -> dict[str, str]:
    """The latest norm, mean and std; how it began against what is customary."""
    columns = ["step", "norm", "mean", "std", "nans", "infs"]
    latest = run.stats("weight", name, columns, steps=(_last(run, name), None)).tail(1)
    found: dict[str, str] = {}
    if len(latest):
        last = latest.iloc[0]
        found = {key: number(last[key]) for key in ("norm", "mean", "std")}
        bad = int(last["nans"] + last["infs"])
        found["bad"] = integer(bad) if bad else ""
    start = run.stats("initial_weight", name, ["std"])
    if len(start):
        found["start"] = number(start["std"].iloc[0])
        if fan and min(fan) > 0:
            xavier, he = expectations(*fan)
            found["start"] += f" (Xavier {number(xavier)}, He {number(he)})"
    return found


def _last(run: Run, name: str) -> int:
    """The last step that has a row of this weight."""
    rows = run.stats("weight", name, ["step", "last_step"], max_points=1)
    return int(rows["last_step"].max()) if len(rows) else 0


def _module_facts(run: Run, name: str) -> dict[str, str]:
    modules = run.modules()
    kind = modules.loc[modules["module"] == name, "type"]
    if len(kind):
        return {"role": str(kind.iloc[0]), "depth": _depth(modules, name, "module")}
    return {"role": "attention" if name in attention_names(run) else "module"}


def _depth(frame: pd.DataFrame, name: str, column: str) -> str:
    place = int(np.argmax((frame[column] == name).to_numpy()))
    return f"{place + 1} of {len(frame)}"


def about(judged: Judgement | None, name: str, module: str) -> list[Any]:
    """The findings that name this layer."""
    return [
        f for f in (judged.findings if judged else []) if name in f.layers or (module and module in f.layers)
    ]


def marks(judged: Judgement | None) -> dict[str, str]:
    """Layer -> the worst severity of the findings that name it."""
    found: dict[str, str] = {}
    for severity in ("info", "warning", "critical"):
        for finding in judged.findings if judged else []:
            if finding.severity == severity:
                found |= dict.fromkeys(finding.layers, severity)
    return found
