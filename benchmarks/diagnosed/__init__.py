"""Ordinary short trainings on made-up data, healthy or with one fault that is measured."""

from __future__ import annotations

from . import held_out, plain, special, tuned  # noqa: F401 - they register their cases
from .family import CASES, Case
from .probe import PROOFS, Probe

__all__ = ["CASES", "PROOFS", "Case", "Probe"]
