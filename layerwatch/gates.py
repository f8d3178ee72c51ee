"""What `layerwatch check` found, in the forms that continuous integration reads: JUnit XML, the commands of
GitHub's workflows, Markdown."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as xml

from .monitor.comparison_text import code, folded, plain_text, table
from .monitor.detectors import registered
from .monitor.findings import SEVERITIES, Finding, NotJudged

#: What XML 1.0 cannot hold, escaped or not.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: GitHub shows ten annotations of a kind for a step: the worst come first.
_KINDS = ("error", "warning", "notice")


@dataclass(frozen=True)
class Checked:
    """One run that was asked for.

    Attributes:
        path: as it was given. steps: how many it has. seconds: what judging it took. error: why it could not
            be read; then there is nothing else.
    """

    path: str
    name: str = ""
    steps: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str = ""


def fails(finding: Finding, fail_on: str | None) -> bool:
    """Whether it is at least so severe. fail_on: None: nothing is."""
    return fail_on is not None and SEVERITIES.index(finding.severity) >= [*SEVERITIES].index(fail_on)


def junit(checked: Sequence[Checked], fail_on: str | None) -> bytes:
    """A report that Jenkins, GitLab and others read.

    A suite for each run; in it a case for each problem: failed by a finding that is severe enough, skipped
    when it was not judged or is the consequence of another, else passed. A run that cannot be read is an
    error. Elements and attributes are those that Jenkins's schema and GitLab's
    documentation share.
    """
    root = xml.Element("testsuites", name="layerwatch")
    for one in checked:
        suite = xml.SubElement(root, "testsuite", name=_xml(one.path))
        if one.error:
            _verdict(_case(suite, one, "readable"), "error", one.error)
        else:
            _cases(suite, one, fail_on)
        _count(suite)
        suite.set("time", f"{one.seconds:.3f}")
        suite.set("timestamp", time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()))
        other = [note for note in one.notes if not isinstance(note, NotJudged)]
        if other:
            xml.SubElement(suite, "system-out").text = _xml("\n".join(other))
    xml.indent(root)
    return xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _cases(suite: xml.Element, one: Checked, fail_on: str | None) -> None:
    """Every problem that there is a detector for."""
    findings = {finding.problem: finding for finding in one.findings}
    causes = {led: finding for finding in one.findings for led in finding.led_to}
    unjudged = {
        problem: note.reason for note in one.notes if isinstance(note, NotJudged) for problem in note.problems
    }
    for problem in dict.fromkeys([problem for problem, _ in registered()[0]] + list(findings)):
        case = _case(suite, one, problem)
        if problem in findings:
            finding = findings[problem]
            if fails(finding, fail_on):
                _verdict(case, "failure", finding.summary, _in_full(finding), finding.severity)
            else:
                xml.SubElement(case, "system-out").text = _xml(_in_full(finding))
        elif problem in causes:
            _verdict(case, "skipped", f"a consequence of {causes[problem].problem}, see there")
        elif problem in unjudged:
            _verdict(case, "skipped", f"not judged: {unjudged[problem]}")


def _case(suite: xml.Element, one: Checked, name: str) -> xml.Element:
    return xml.SubElement(suite, "testcase", classname=_xml(one.path), name=_xml(name))


def _verdict(case: xml.Element, kind: str, message: str, text: str = "", type_: str = "") -> None:
    more = {"type": type_} if type_ else {}
    element = xml.SubElement(case, kind, {"message": _xml(" ".join(message.split())), **more})
    element.text = _xml(text or message)


def _count(suite: xml.Element) -> None:
    """How many cases there are, and how they ended."""
    suite.set("tests", str(len(suite.findall("testcase"))))
    for attribute, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(attribute, str(len(suite.findall(f"testcase/{kind}"))))


def _xml(text: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _in_full(finding: Finding) -> str:
    """All that helps who reads it: what, where, since when, what to do."""
    where = [f"layers: {', '.join(finding.layers)}"] if finding.layers else []
    when = f"steps: {finding.first_step} to {finding.last_step}"
    more = f"more: layerwatch explain {finding.problem}"
    return "\n".join([f"{finding.severity}: {finding.summary}", *where, when, finding.advice, more])


def github(checked: Sequence[Checked], fail_on: str | None) -> list[str]:
    """Commands of a GitHub workflow, one a line; the last line is for the log.

    An error is a finding that fails the check or is critical, and a run that cannot be read; other alarms are
    warnings. Remarks, and what was not judged, are notices.
    """
    lines = []
    for one in checked:
        if one.error:
            lines.append(_command("error", f"{one.path} was not judged", one.error))
        for finding in one.findings:
            lines.append(
                _command(_kind(finding, fail_on), f"{finding.problem} in {one.path}", _in_full(finding))
            )
        if one.notes:
            lines.append(_command("notice", f"notes on {one.path}", "\n".join(one.notes)))
    alarms = sum(finding.alarm for one in checked for finding in one.findings)
    unread = sum(bool(one.error) for one in checked)
    ranked = sorted(lines, key=lambda line: _KINDS.index(line[2:].partition(" ")[0]))
    counts = (len(checked), "run"), (alarms, "alarm"), (unread, "run")
    runs, found, lost = (f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    return [*ranked, f"layerwatch: {runs}, {found}, {lost} that cannot be read"]


def _kind(finding: Finding, fail_on: str | None) -> str:
    if finding.severity == "critical" or fails(finding, fail_on):
        return "error"
    return "warning" if finding.alarm else "notice"


def _command(kind: str, title: str, message: str) -> str:
    """`::kind title=...::message`, escaped as GitHub's runner reads it: no text becomes a command."""
    head = _escape(" ".join(title.split())).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={head}::{_escape(message)}"


def _escape(text: str) -> str:
    """What ends a line for any reader ends it for the runner."""
    return "%0A".join(text.replace("%", "%25").splitlines())


def markdown(checked: Sequence[Checked], fail_on: str | None) -> str:
    """A summary for a pull request or a job."""
    failed = [one for one in checked if one.error or any(fails(f, fail_on) for f in one.findings)]
    alarms = sum(finding.alarm for one in checked for finding in one.findings)
    verdict = f"{len(failed)} of {len(checked)} failed" if failed else f"{len(checked)} passed"
    rows = [_row(one, finding) for one in checked for finding in one.findings]
    columns = ("run", "severity", "problem", "where", "what, and what to try first")
    notes = [f"- {code(one.path)}: {plain_text(note)}" for one in checked for note in one.notes]
    parts = [
        f"### layerwatch check: {verdict}",
        f"Runs: {len(checked)}. Alarms: {alarms}. Fails on: {fail_on or 'nothing'}.",
        table(columns, rows) if rows else "",
        "\n".join(
            f"- {code(one.path)} was not judged: {plain_text(one.error)}" for one in checked if one.error
        ),
        folded(f"Notes ({len(notes)})", "\n".join(notes)) if notes else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(one: Checked, finding: Finding) -> tuple[str, ...]:
    where = ", ".join(code(name) for name in finding.layers[:3])
    more = f" +{len(finding.layers) - 3}" if len(finding.layers) > 3 else ""
    severity = f"**{finding.severity}**" if finding.severity == "critical" else finding.severity
    what = f"Since step {finding.first_step}: {finding.summary} {finding.advice}"
    return code(one.path), severity, code(finding.problem), where + more, what
