"""`Finding`: what is wrong, where, since when, what to do; and `find`, which asks every detector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .detectors.history import History
    from .normal import Normal
    from .run import Run

Severity = Literal["info", "warning", "critical"]
Number = float | int | str

#: Ascending. warning and critical are alarms; info is a remark.
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")


@dataclass(frozen=True)
class Finding:
    """One problem of one run."""

    run: str
    problem: str  # one of the problem codes, e.g. "vanishing_gradients"
    severity: Severity
    layers: tuple[str, ...]  # tensor or module names, worst first; () when it is about the whole run
    first_step: int  # the step where it began, not where it was noticed
    last_step: int
    summary: str  # one sentence with the numbers
    evidence: dict[str, Number] = field(default_factory=dict)  # numbers, with the thresholds they crossed
    advice: str = ""  # what to try first
    confidence: float = 1.0  # 0 to 1

    @property
    def alarm(self) -> bool:
        """Severity is warning or critical."""
        return self.severity != "info"

    @property
    def led_to(self) -> tuple[str, ...]:
        """The problems that it brought about, which are no findings of their own."""
        return tuple(str(self.evidence["led_to"]).split(", ")) if "led_to" in self.evidence else ()

    def line(self) -> str:
        """All that matters in one line."""
        summary = " ".join(self.summary.split())
        return f"{self.severity}: {self.problem} since step {self.first_step}: {summary}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain types, None where a number is not finite."""
        return {name: plain(value) for name, value in asdict(self).items()}


class NotJudged(str):
    """A note that some problems were not judged.

    Attributes:
        problems: their codes. reason: why.
    """

    problems: tuple[str, ...]
    reason: str

    def __new__(cls, note: str, problems: Sequence[str], reason: str) -> NotJudged:
        self = super().__new__(cls, note)
        self.problems, self.reason = tuple(problems), reason
        return self


class News:
    """Tells what is new in the findings of a run that is judged again and again.

    A problem is news once, and again when it is worse than ever before; not when it comes back.
    """

    def __init__(self) -> None:
        self._told: dict[str, int] = {}  # problem -> the worst severity that was told

    def of(self, findings: Sequence[Finding]) -> list[Finding]:
        """Those that are news; the next time they are none."""
        found = []
        for finding in findings:
            severity = SEVERITIES.index(finding.severity)
            if severity > self._told.get(finding.problem, -1):
                self._told[finding.problem] = severity
                found.append(finding)
        return found


#: What makes a training break down in many ways.
_BLOWS = (
    "data_fault", "bad_init_scale", "gradient_underflow", "learning_rate_too_high", "schedule_fault",
    "stale_gradients", "weight_growth", "excessive_drift",
)  # fmt: skip
#: What keeps a training from learning.
_STOPS = (
    "symmetric_units", "learning_rate_too_low", "gradient_underflow", "low_precision_stall", "adam_epsilon",
    "over_clipping", "over_regularised", "loss_scale_collapse", "dead_units", "saturated_units",
    "vanishing_gradients", "exploding_gradients",
    "attention_collapse", "logit_drift", "loss_spike", "nonfinite", "unused_parameters", "frozen_parameters",
    "layer_imbalance", *_BLOWS,
)  # fmt: skip
#: problem -> problems that bring it about. A finding is folded under the first cause that is an alarm of the
#: same run and began no later. The table's order is that of findings: what is higher explains what is lower.
CAUSES: dict[str, tuple[str, ...]] = {
    "data_fault": (),
    "replica_desync": (),
    "bad_init_scale": ("data_fault",),
    "symmetric_units": (),
    "schedule_fault": (),
    "loss_scale_collapse": ("data_fault", "bad_init_scale"),
    "gradient_underflow": (),
    "low_precision_stall": (),
    "adam_epsilon": (),
    "over_clipping": (),
    "over_regularised": (),
    "stale_gradients": ("gradient_underflow",),  # what is left of a gradient says little about its course
    "learning_rate_too_high": (
        "data_fault",
        "bad_init_scale",
        "symmetric_units",
        "over_regularised",
        "loss_scale_collapse",
        "gradient_underflow",
        "schedule_fault",
        "stale_gradients",
    ),
    "learning_rate_too_low": (
        "adam_epsilon",
        "over_clipping",
        "low_precision_stall",
        "gradient_underflow",
        "schedule_fault",
    ),
    "weight_growth": (
        "data_fault",
        "learning_rate_too_high",
        "loss_scale_collapse",
        "gradient_underflow",
        "schedule_fault",
        "stale_gradients",
        "bad_init_scale",
        "loss_spike",
    ),
    "excessive_drift": ("schedule_fault",),
    "saturated_units": (
        "data_fault",
        "bad_init_scale",
        "learning_rate_too_high",
        "schedule_fault",
        "weight_growth",
    ),
    "frozen_parameters": ("low_precision_stall", "schedule_fault", "vanishing_gradients"),
    "dead_units": ("symmetric_units", "loss_spike", *_BLOWS),
    "unused_parameters": ("symmetric_units", "dead_units", "gradient_underflow", *_BLOWS),
    "exploding_gradients": ("saturated_units", "loss_spike", *_BLOWS),
    "vanishing_gradients": (
        "dead_units",
        "saturated_units",
        "symmetric_units",
        "exploding_gradients",
        *_BLOWS,
    ),
    "layer_imbalance": (
        "vanishing_gradients",
        "exploding_gradients",
        "saturated_units",
        "dead_units",
        *_BLOWS,
    ),
    "attention_collapse": _BLOWS,
    "logit_drift": _BLOWS,
    "loss_spike": (
        "bad_init_scale",
        "gradient_underflow",
        "learning_rate_too_high",
        "schedule_fault",
        "stale_gradients",
    ),
    "nonfinite": ("loss_scale_collapse", "exploding_gradients", "loss_spike", *_BLOWS),
    "not_learning": _STOPS,
    "overfitting": ("not_learning",),
    "regression": (*_STOPS, "not_learning", "overfitting"),
    "quantisation_risk": (),
}


def find(run: Run, baselines: Sequence[Run] | Normal = ()) -> tuple[list[Finding], list[str]]:
    """Ask every registered detector about a run.

    Args:
        run: the run to judge. baselines: earlier good runs of the same training, or what was learnt of them.

    Returns: Findings, root cause first, then worst first, one per problem; and notes: what could not be
        judged, and why. A detector that raises becomes a note.
    """
    from .detectors.history import History
    from .detectors.thinned import Thinned, sparing
    from .normal import known

    source, normal = sparing(run), known(baselines)
    found, notes = judge(History(source), normal)
    return found, [*notes, source.note] if isinstance(source, Thinned) else notes


def judge(history: History, normal: Normal | None = None) -> tuple[list[Finding], list[str]]:
    """`find` on a history."""
    from .detectors import registered
    from .detectors.needs import lacking
    from .detectors.registry import Unjudged
    from .detectors.regression import notes as remarks

    detectors, notes = registered()
    history.normal = normal
    notes += remarks(history)
    found: dict[str, Finding] = {}
    unjudged: dict[str, list[str]] = {}  # reason -> problems
    for problem, detector in detectors:
        try:
            finding = _checked(detector(history))
            if finding is None and (lack := lacking(problem, history)):
                raise Unjudged(lack)
        except Unjudged as reason:
            unjudged.setdefault(str(reason), []).append(problem)
            continue
        except Exception as error:  # a broken detector must not hide what the others see
            why = f"{type(error).__name__}: {error}"
            note = f"the detector of {problem} failed: {why}"
            notes.append(NotJudged(note, [problem], f"its detector failed: {why}"))
            continue
        if finding is not None and _worse(finding, found.get(finding.problem)):
            found[finding.problem] = finding
    return _ordered(_fold(found, history.slack)), [*_lacks(unjudged), *notes]


def _lacks(unjudged: dict[str, list[str]]) -> list[NotJudged]:
    """One note for each reason, however many problems it hides."""
    notes = []
    for reason, hidden in unjudged.items():
        problems = list(dict.fromkeys(hidden))
        were = "was" if len(problems) == 1 else "were"
        notes.append(NotJudged(f"{', '.join(problems)} {were} not judged: {reason}", problems, reason))
    return notes


def _checked(answer: Any) -> Finding | None:
    """What a detector answered, when it is an answer: anybody's detector must not break the others."""
    if answer is None or (isinstance(answer, Finding) and answer.severity in SEVERITIES):
        return answer
    raise TypeError(f"expected a Finding of a known severity, or None, got {str(answer)[:80]}")


def _worse(new: Finding, old: Finding | None) -> bool:
    return old is None or SEVERITIES.index(new.severity) > SEVERITIES.index(old.severity)


def _fold(found: dict[str, Finding], slack: int) -> list[Finding]:
    """Put consequences under their root cause. `slack`: steps by which captures may blur an order in time."""
    parent = {}
    for problem, finding in found.items():
        # That nothing was learnt dates from step 0 by its nature: any early fault may be the reason.
        latest = finding.first_step + max(slack, finding.last_step // 10 if problem == "not_learning" else 0)
        for cause in CAUSES.get(problem, ()):
            other = found.get(cause)
            if other is not None and other.alarm and other.first_step <= latest:
                parent[problem] = cause
                break
    kept = []
    for problem, finding in found.items():
        if problem in parent:
            continue
        led = [
            f for name, f in found.items() if f.alarm and _root(name, parent) == problem and name != problem
        ]
        kept.append(_with_consequences(finding, sorted(led, key=lambda f: f.first_step)))
    return kept


def _root(problem: str, parent: dict[str, str]) -> str:
    seen = set()
    while problem in parent and problem not in seen:
        seen.add(problem)
        problem = parent[problem]
    return problem


def _with_consequences(finding: Finding, led: list[Finding]) -> Finding:
    if not led:
        return finding
    names = ", ".join(f"{f.problem.replace('_', ' ')} (step {f.first_step})" for f in led)
    worst = max((finding, *led), key=lambda f: SEVERITIES.index(f.severity))
    return replace(
        finding,
        severity=worst.severity,
        last_step=max(f.last_step for f in (finding, *led)),
        summary=f"{finding.summary.rstrip('.')}; it led to {names}.",
        evidence={**finding.evidence, "led_to": ", ".join(f.problem for f in led)},
    )


def _ordered(findings: list[Finding]) -> list[Finding]:
    rank = {problem: place for place, problem in enumerate(CAUSES)}
    return sorted(
        findings,
        key=lambda f: (
            not f.alarm,
            rank.get(f.problem, len(rank)),
            -SEVERITIES.index(f.severity),
            f.first_step,
        ),
    )


def plain(value: Any) -> Any:
    """For JSON: plain types, None where a number is not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if hasattr(value, "item"):  # a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
