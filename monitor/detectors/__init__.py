"""One file per family of faults; each reads a run and says what is wrong.

A detector is a pure function `History -> Finding | None`. To add one, decorate it with
`detector("problem_code")` and name its module in the entry point group `layerwatch.detectors`.
"""

from .history import Arrays, History, Series
from .registry import Detector, Unjudged, detector, registered

__all__ = ["Arrays", "Detector", "History", "Series", "Unjudged", "detector", "registered"]
