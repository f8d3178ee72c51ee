"""A comparison as Markdown that can be attached to a pull request as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .results import FEWEST, Difference, Metric
from .wording import MISSING, integer, number, printable

if TYPE_CHECKING:
    from .comparing import Comparison
    from .findings import Finding
    from .weights.report import Drift

#: As a result is judged: how it is called.
VERDICTS = {
    "same": "the same",
    "within": "within seed noise",
    "better": "**better**",
    "worse": "**worse**",
    "different": "**different**",
    "unknown": "cannot be told",
}


def markdown(found: Comparison) -> str:
    """Verdict, results, where they part; settings, layers and findings folded."""
    head = f"### {code(found.b)} against {code(found.a)}"
    slices = [one for one in found.metrics if one.slice_of]
    whole = [one for one in found.metrics if not one.slice_of]
    parts = [
        head,
        f"{verdict(found)} {noise_note(found)}",
        results_table(found, whole) if whole else "",
        *(f"> {sentence}" for sentence in slice_sentences(found.metrics)),
        folded(f"Slices ({len(slices)})", results_table(found, slices)) if slices else "",
        plain_text(found.sentence),
        settings_part(found),
        layers_part(found),
        findings_part(found),
        *(f"Note: {plain_text(note)}" for note in found.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict(found: Comparison) -> str:
    """The result in a sentence."""
    told = {word: [m.name for m in found.metrics if m.last.verdict == word] for word in VERDICTS}
    beyond = [
        f"{word} in {', '.join(code(name) for name in told[word][:3])}"
        + (f" and {len(told[word]) - 3} more" if len(told[word]) > 3 else "")
        for word in ("worse", "better", "different")
        if told[word]
    ]
    if beyond:
        return f"By more than seed noise, {code(found.b)} ended {'; '.join(beyond)}."
    if not found.metrics:
        return "The runs have no logged result in common."
    if len(told["same"]) == len(found.metrics):
        return "Every logged result ended the same."
    if told["within"]:
        return "No result ended further apart than the seed alone may bring about."
    return "Whether the results differ by more than seed noise cannot be told."


def noise_note(found: Comparison) -> str:
    """What the verdict rests on."""
    if not found.metrics:
        return ""
    known = max((one.last.runs for one in found.metrics), default=0)
    if known < FEWEST:
        more = FEWEST - known
        return (
            f"It takes {FEWEST} runs like {code(found.a)}, itself among them, that differ in their seed "
            f"alone: give {more} more with `--repeats`."
        )
    judged = sum(one.last.verdict not in ("unknown", "same") for one in found.metrics)
    return (
        f"Judged by {known} runs like {code(found.a)}: outside of where 95 of 100 further ones end "
        f"(prediction interval, Student's t). By chance {number(0.05 * judged)} of {judged} results would be."
    )


def results_table(found: Comparison, metrics: Sequence[Metric]) -> str:
    """Final and best values."""
    columns = ("result", code(found.a), code(found.b), "difference", "95 % of runs like A", "verdict")
    return table(columns, [cells for one in metrics for cells in cells_of(one)])


def cells_of(one: Metric) -> list[tuple[str, ...]]:
    """Rows of a table: the final value, and the best one if that is another."""
    rows = [(code(one.name), *_cells(one.last))]
    if one.best is not None and (one.best.a, one.best.b) != (one.last.a, one.last.b):
        steps = " and ".join(integer(step) for step in one.best_steps)
        rows.append((f"best (step {steps})", *_cells(one.best)))
    return rows


def _cells(one: Difference) -> tuple[str, ...]:
    interval = MISSING if one.low is None else f"{precise(one.low)} to {precise(one.high)}"
    return precise(one.a), precise(one.b), change(one.a, one.b), interval, VERDICTS[one.verdict]


def precise(value: float | None) -> str:
    """Four digits: results of two runs differ in what three do not show."""
    return number(value) if value is None or not math.isfinite(value) else f"{value:.4g}"


def change(a: float | None, b: float | None) -> str:
    """b - a, signed, and as a share of a."""
    if a is None or b is None or not math.isfinite(b - a):
        return MISSING
    signed = f"{b - a:+.3g}".replace("-", "−", 1)
    if a in (0, b):
        return signed
    return f"{signed} ({'−' if b < a else '+'}{number(100 * abs((b - a) / a))} %)"


def slice_sentences(metrics: Sequence[Metric]) -> list[str]:
    """Slices that became worse although the whole did not: what an average hides."""
    whole = {one.name: one for one in metrics if not one.slice_of}
    hidden = [
        one
        for one in metrics
        if one.slice_of and one.last.verdict == "worse" and whole[one.slice_of].last.verdict != "worse"
    ]
    return [
        f"{code(one.name)} is worse ({precise(one.last.a)} → {precise(one.last.b)}) although "
        f"{code(one.slice_of)} is not."
        for one in hidden
    ]


def settings_part(found: Comparison) -> str:
    """Settings that differ."""
    if not found.settings:
        return f"No setting differs ({found.same_settings} are the same)."
    columns = ("setting", code(found.a), code(found.b))
    rows = [[code(text) for text in row] for row in found.settings]
    return folded(f"Settings that differ ({len(rows)}; {found.same_settings} do not)", table(columns, rows))


def layers_part(found: Comparison) -> str:
    """The layers that differ most."""
    if not found.layers:
        return ""
    columns = ("layer", code(found.a), code(found.b), "apart")
    rows = [(code(name), *(number(x) for x in numbers)) for name, *numbers in found.layers]
    body = f"{plain_text(found.measure[:1].upper() + found.measure[1:])}.\n\n{table(columns, rows)}"
    return folded(f"Layers that differ most at the end: {code(found.layers[0][0])} first", body)


def findings_part(found: Comparison) -> str:
    """What only one of them has."""
    if not found.findings:
        return "Their findings are the same."
    columns = ("problem", code(found.a), code(found.b))
    rows = []
    for one, two in found.findings:
        problems = [finding.problem for finding in (one, two) if finding is not None]
        rows.append((code(problems[0]), _finding(one), _finding(two)))
    new = sum(one is None for one, _ in found.findings)
    return folded(f"Findings that differ ({len(rows)}, {new} of them new)", table(columns, rows))


def _finding(one: Finding | None) -> str:
    return MISSING if one is None else f"{one.severity} since step {one.first_step}: {one.summary}"


# Weights ----------------------------------------------------------------------------------------------------


def drift_markdown(drift: Drift) -> str:
    """How far the blocks moved; unusual tensors, and all that was not compared, folded."""
    blocks = drift.groups("block")
    rows = [
        (code(str(one["block"])), str(one["tensors"]), _percent(one["relative_l2"]), number(one["cosine"]))
        for one in blocks
    ]
    unusual = [
        (code(r["tensor"]), _percent(r["relative_l2"]), r["unusual"]) for r in drift.rows if r["unusual"]
    ]
    left = [
        *((code(name), "only in A") for name in drift.only_in_a),
        *((code(name), "only in B") for name in drift.only_in_b),
        *((code(r["tensor"]), f"{r['shape_a']} became {r['shape_b']}") for r in drift.reshaped),
        *((code(r["tensor"]), f"{r['dtype_a']} became {r['dtype_b']}") for r in drift.retyped),
        *((code(r["tensor"]), str(r["why"])) for r in drift.not_compared),
    ]
    still = sum(row["relative_l2"] == 0 for row in drift.rows)
    parts = [
        f"### {code(drift.b)} against {code(drift.a)}",
        f"{integer(len(drift.rows))} tensors are in both, {integer(still)} of them did not move.",
        table(("block", "tensors", "moved by", "cosine"), rows) if rows else "",
        folded(f"Unusual ({len(unusual)})", table(("tensor", "moved by", "why"), unusual)) if unusual else "",
        folded(f"Not as in both ({len(left)})", table(("tensor", "what"), left)) if left else "",
        *(f"Note: {plain_text(note)}" for note in drift.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{number(100 * value)} %"


# Markdown ---------------------------------------------------------------------------------------------------


def code(text: str) -> str:
    """A name as it is: nothing in it is Markdown, HTML or a mention."""
    flat = printable(" ".join(text.split())).replace("`", "'")
    return f"`{flat}`" if flat else MISSING


def plain_text(text: str) -> str:
    """A sentence in which nothing is Markdown, HTML or a mention."""
    flat = printable(" ".join(text.split()))
    for mark, instead in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("@", "@\u200b")):
        flat = flat.replace(mark, instead)
    for mark in "`*_[]|#":
        flat = flat.replace(mark, f"\\{mark}")
    return flat


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what is no code and not bold is taken as plain text."""
    head, *body = ([_cell(text) for text in row] for row in (columns, *rows))
    lines = [head, ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    if text.startswith(("`", "**")):
        return text.replace("|", "\\|")
    return plain_text(text)


def folded(title: str, body: str) -> str:
    """Details that open at a click."""
    return f"<details><summary>{_html(title)}</summary>\n\n{body}\n\n</details>"


def _html(title: str) -> str:
    """Code spans are not read in HTML blocks."""
    safe = title.replace("&", "&amp;").replace("<", "&lt;").replace("@", "@\u200b")
    pieces = safe.split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))
