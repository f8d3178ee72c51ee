"""What TensorBoard's tags mean: which tensor and kind a histogram is of, and which scalar a number is.

The names of tags are their writers' free choice. What is recognised by default is what torch, Lightning, the
Hugging Face Trainer and Keras users write; rules of the user's come first.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import RunError
from .schema import KINDS

#: What a histogram can be imported as; "skip" leaves it out.
IMPORTED = ("weight", "initial_weight", "gradient", "update", "activation", "momentum", "skip")
#: Parts of one training that Keras and others write into folders of their own.
TRAIN = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval", "evaluation", "dev")

_GRADIENT = re.compile(r"(?:^|(?<=[/._:-]))grad(?:ient)?s?(?=$|[/._:-])", re.IGNORECASE)
_ACTIVATION = re.compile(
    r"(?:^|(?<=/))(?:activations?|acts?|outputs?)(?=$|/)|[._]activations?$", re.IGNORECASE
)
_PREFIX = re.compile(r"^(?:weights?|param(?:eter)?s?|histograms?|values?)/", re.IGNORECASE)
_SUFFIX = re.compile(r"/histogram$|:0$")

Rule = tuple["re.Pattern[str]", str]


def rules(given: Sequence[tuple[str, str]], option: str) -> list[Rule]:
    """Compiled (regex, meaning) pairs.

    Raises:
        RunError: a regex is none.
    """
    compiled = []
    for pattern, meaning in given:
        try:
            compiled.append((re.compile(pattern), meaning))
            compiled[-1][0].sub(meaning, "")  # what \\1 stands for exists
        except re.error as error:
            raise RunError(
                f"expected a regular expression for {option}, got {pattern!r} ({error}): mend it, or escape "
                "its special characters with a backslash"
            ) from None
    return compiled


def default_histogram(tag: str) -> tuple[str, str]:
    """Tensor and kind: gradients and activations are known by their names, what is neither is a weight."""
    tag = _SUFFIX.sub("", tag)
    for kind, mark in (("gradient", _GRADIENT), ("activation", _ACTIVATION)):
        if mark.search(tag):
            tensor = re.sub(r"(?<=[/._:-])[/._:-]+", "", mark.sub("", tag)).strip("/._:-")
            return _PREFIX.sub("", tensor) or tag, kind
    return _PREFIX.sub("", tag) or tag, "weight"


def default_scalar(tag: str) -> str:
    """train_loss, val_loss and lr under the names that detectors and pages know; the rest keeps its own."""
    words = sorted(w for w in re.split(r"[/_.\- ]+", tag.lower()) if w and w != "epoch")
    rest = [w for w in words if w not in TRAIN]
    if rest == ["loss"]:
        return "train_loss"
    if len(words) == 2 and "loss" in words and any(w in VALIDATION for w in words):
        return "val_loss"
    return "lr" if rest in (["lr"], ["learning", "rate"]) else tag


@dataclass
class Names:
    """The names of one training. Two tags never share one: the first that asks has it.

    Args:
        histograms: regex -> kind, the first that is found in a tag counts; its group `tensor` names the
            tensor. scalars: regex -> name, in which \\1 is the regex's first group.
    """

    histograms: Sequence[Rule] = ()
    scalars: Sequence[Rule] = ()
    _taken: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    _known: dict[tuple[str, str, str], tuple[str, str]] = field(default_factory=dict)

    def histogram(self, part: str, tag: str) -> tuple[str, str]:
        """Tensor and kind of a tag in a part ("" or the folder's name) of the training."""
        if (key := ("histogram", part, tag)) not in self._known:
            name = tag if part in ("", *TRAIN) else f"{part}/{tag}"
            tensor, kind = default_histogram(name)
            for pattern, meaning in self.histograms:
                if found := pattern.search(name):
                    tensor, kind = found.groupdict().get("tensor") or tensor, meaning
                    break
            self._known[key] = self._claim(kind, tensor, (part, tag), name), kind
        return self._known[key]

    def scalar(self, part: str, tag: str) -> str:
        """The scalar's name."""
        if (key := ("scalar", part, tag)) not in self._known:
            begin = tag.replace("/", "_") + "_"  # torch's add_scalars makes a folder of tag and key
            joined = f"{tag}/{part[len(begin) :]}" if part.startswith(begin) else f"{part}/{tag}"
            full = joined if part else tag
            name = default_scalar(full)
            for pattern, meaning in self.scalars:
                if found := pattern.search(full):
                    name = found.expand(meaning)
                    break
            self._known[key] = self._claim("scalar", name, (part, tag), full), ""
        return self._known[key][0]

    def _claim(self, kind: str, name: str, tag: tuple[str, str], own: str) -> str:
        """`name` if no other tag has it, else the tag's own name."""
        others = (f"{own} ({n})" for n in itertools.count(2))
        return next(
            n for n in itertools.chain((name, own), others) if self._taken.setdefault((kind, n), tag) == tag
        )


def kind_named(text: str) -> str:
    """A kind that histograms can be imported as.

    Raises:
        RunError: it is none.
    """
    if text not in IMPORTED:
        known = "a kind of computed numbers" if text in KINDS else "unknown"
        raise RunError(
            f"expected one of {', '.join(IMPORTED)}, got {text!r}, which is {known}: choose one of them"
        )
    return text
