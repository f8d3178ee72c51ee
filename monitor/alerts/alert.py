"""`Alert`: one thing to tell about one run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..findings import Finding, Severity, plain

#: What is told beside the problem codes of the detectors, by who looks at a training from outside.
SILENT, WRITES_AGAIN = "silent", "writes_again"
#: What `layerwatch alerts test` sends.
TEST = "test"


@dataclass(frozen=True)
class Alert:
    """Attributes:
    run: as shown to people. key: what it is known by, whatever its folder is called.
    problem: a problem code, SILENT or WRITES_AGAIN. summary: one sentence with the numbers.
    first_step, last_step: -1 where none is known. time: unix seconds when it was noticed.
    link: a page of the dashboard, "" when nobody said where that is.
    """

    run: str
    key: str
    problem: str
    severity: Severity
    summary: str
    layers: tuple[str, ...] = ()
    first_step: int = -1
    last_step: int = -1
    advice: str = ""
    owner: str = ""
    tags: tuple[str, ...] = ()
    link: str = ""
    time: float = 0.0

    @classmethod
    def of(cls, finding: Finding, **about: Any) -> Alert:
        """About a finding. `about`: the fields that a finding has not."""
        return cls(
            problem=finding.problem,
            severity=finding.severity,
            summary=" ".join(finding.summary.split()),
            layers=tuple(finding.layers),
            first_step=finding.first_step,
            last_step=finding.last_step,
            advice=finding.advice,
            **about,
        )

    @property
    def words(self) -> str:
        """The problem as people say it: `dead units`."""
        return self.problem.replace("_", " ")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Alert:
        """What `to_dict` made.

        Raises:
            KeyError, TypeError: it did not.
        """
        return cls(**{**content, "layers": tuple(content["layers"]), "tags": tuple(content["tags"])})
