"""`layerwatch check` as a gate: reports for CI systems, annotations, runs that cannot be read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

from layerwatch import Run
from layerwatch.cli import main
from layerwatch.gates import Checked, github, junit, markdown
from layerwatch.monitor.detectors import registered
from layerwatch.monitor.findings import Finding, NotJudged
from tests.test_cli import train

Result = tuple[int, str, str]
FINDING = Finding(
    "exp1", "vanishing_gradients", "critical", ("0.weight", "2.weight"), 10, 90,
    "The gradients vanish.", {"led_to": "not_learning"}, "Try a residual connection.",
)  # fmt: skip
LACK = NotJudged("overfitting was not judged: no val_loss", ["overfitting"], "no val_loss")
CHECKED = Checked("runs/exp1", "exp1", 100, [FINDING], [LACK, "stats/1.parquet: is cut"], 0.25)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy and a broken run, and an empty folder that is none."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "healthy")
    train(root / "broken", broken=True)
    (root / "nothing").mkdir()
    return root


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Runs `check` among the runs: exit code, stdout, stderr."""
    monkeypatch.chdir(runs)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def check(*arguments: object) -> Result:
        code = main(["check", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return check


# JUnit ------------------------------------------------------------------------------------------------------

#: element -> (children, attributes that it must have, attributes that it may have), as in junit-10.xsd of
#: Jenkins; elements that its schema does not share with other readers (rerunFailure, ...) are left out.
SCHEMA = {
    "testsuites": ({"testsuite"}, set(), {"name", "time", "tests", "failures", "errors"}),
    "testsuite": (
        {"properties", "testcase", "system-out", "system-err"}, {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package"},
    ),
    "testcase": ({"skipped", "error", "failure", "system-out"}, {"name"}, {"classname", "time"}),
    "failure": (set(), set(), {"type", "message"}),
    "error": (set(), set(), {"type", "message"}),
    "skipped": (set(), set(), {"type", "message"}),
    "system-out": (set(), set(), set()),
}  # fmt: skip


def faults(element: xml.Element) -> Iterator[str]:
    """What Jenkins or GitLab would not read."""
    children, required, optional = SCHEMA[element.tag]
    given = set(element.keys())
    yield from (f"{element.tag} lacks {name}" for name in required - given)
    yield from (f"{element.tag} has {name}" for name in given - required - optional)
    yield from (f"{child.tag} in {element.tag}" for child in element if child.tag not in children)
    if children and (element.text or "").strip():
        yield f"text in {element.tag}"
    if element.tag == "testcase":
        if not element.get("classname"):
            yield "GitLab knows a case by its class and name"
        if len([child for child in element if child.tag in ("skipped", "error", "failure")]) > 1:
            yield "GitLab and Jenkins keep one verdict of a case"
    if element.tag == "testsuite":
        names = [(case.get("classname"), case.get("name")) for case in element.iter("testcase")]
        if len(set(names)) < len(names):
            yield "GitLab ignores the second case of a name"
        for attribute, path in (
            ("tests", "testcase"), ("failures", "testcase/failure"),
            ("errors", "testcase/error"), ("skipped", "testcase/skipped"),
        ):  # fmt: skip
            if element.get(attribute) != str(len(element.findall(path))):
                yield f"{attribute} is {element.get(attribute)}"
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp") or ""):
            yield f"timestamp is {element.get('timestamp')}"
        if not re.fullmatch(r"\d{1,3}\.\d+", element.get("time") or ""):
            yield f"time is {element.get('time')}"
    for child in element:
        yield from faults(child)


def read(report: bytes) -> tuple[xml.Element, dict[tuple[str, str], xml.Element]]:
    """The report, and its cases by class and name."""
    root = xml.fromstring(report)
    assert list(faults(root)) == []
    cases = {(case.attrib["classname"], case.attrib["name"]): case for case in root.iter("testcase")}
    return root, cases


def verdict(case: xml.Element) -> str:
    return next((child.tag for child in case if child.tag != "system-out"), "passed")


def test_the_rules_of_the_schema_are_checked() -> None:
    case = '<testcase name="a" classname="c"><failure/><skipped/></testcase>'
    wrong = (
        '<testsuites skipped="1"><testsuite name="x" tests="2" failures="1" errors="0" skipped="1" '
        f'time="1e-3" timestamp="now">text{case}{case}<failure/></testsuite></testsuites>'
    )
    found = "; ".join(faults(xml.fromstring(wrong)))
    for part in (
        "testsuites has skipped", "one verdict", "second case", "failures is 1", "text in testsuite",
        "failure in testsuite", "timestamp is now", "time is 1e-3",
    ):  # fmt: skip
        assert part in found


def test_a_report_has_a_suite_for_each_run_and_a_case_for_each_problem(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    report = tmp_path / "new" / "folder" / "report.xml"
    code, out, _ = call("healthy", "broken", "--fail-on", "critical", "--junit", report)
    assert code == 1
    assert "no alarm" in out  # the text is printed as ever
    root, cases = read(report.read_bytes())
    assert [suite.get("name") for suite in root] == ["healthy", "broken"]
    problems = dict.fromkeys(problem for problem, _ in registered()[0])
    assert list(cases) == [(run, problem) for run in ("healthy", "broken") for problem in problems]
    assert {verdict(case) for (run, _), case in cases.items() if run == "healthy"} <= {"passed", "skipped"}
    failure = cases["broken", "nonfinite"].find("failure")
    finding = Run("broken").findings()[0]
    assert failure is not None
    assert (failure.get("message"), failure.get("type")) == (finding.summary, "critical")
    assert failure.text
    for part in (finding.summary, finding.advice, finding.layers[0], "steps: 10 to 29"):
        assert part in failure.text
    skipped = cases["healthy", "overfitting"].find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "not judged: no validation loss was logged (val_loss or eval_loss)"
    assert list(report.parent.iterdir()) == [report]


def test_only_what_fails_the_check_is_a_failure() -> None:
    for fail_on, severity, expected in (
        (None, "critical", "passed"), ("critical", "warning", "passed"), ("warning", "warning", "failure"),
        ("warning", "critical", "failure"), ("warning", "info", "passed"),
    ):  # fmt: skip
        checked = replace(CHECKED, findings=[replace(FINDING, severity=severity)])
        case = read(junit([checked], fail_on))[1]["runs/exp1", "vanishing_gradients"]
        assert verdict(case) == expected, (fail_on, severity)
        texts = [child.text or "" for child in case]
        assert any("Try a residual connection." in text for text in texts)  # said even where it passed


def test_what_was_not_judged_and_what_follows_from_another_problem_is_skipped() -> None:
    root, cases = read(junit([CHECKED], "warning"))
    reasons = {name: case.find("skipped") for (_, name), case in cases.items()}
    messages = {name: reason.get("message") for name, reason in reasons.items() if reason is not None}
    assert messages == {
        "not_learning": "a consequence of vanishing_gradients, see there",
        "overfitting": "not judged: no val_loss",
    }
    assert root.findtext("testsuite/system-out") == "stats/1.parquet: is cut"


def test_any_text_makes_a_report_that_can_be_read() -> None:
    odd = "<b> & \"'\x00\x1b[31m\ud800\ufffe ]]> \N{SNOWMAN}\n\t"
    checked = replace(CHECKED, path=odd, findings=[replace(FINDING, summary=odd, layers=(odd,))], notes=[odd])
    root, cases = read(junit([checked, Checked("gone", error=odd)], "critical"))
    shown = "<b> & \"'\ufffd\ufffd[31m\ufffd\ufffd ]]> \N{SNOWMAN}"
    assert shown in (root.findtext("testsuite/system-out") or "")
    assert shown in (cases["gone", "readable"].findtext("error") or "")


# Runs that cannot be read -----------------------------------------------------------------------------------


def test_a_run_that_cannot_be_read_takes_nothing_from_the_others(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = ["nothing", "broken", "gone", "--fail-on", "critical", "--junit", tmp_path / "r.xml"]
    code, out, err = call(*arguments)
    assert code == 2
    assert "nonfinite" in out
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("layerwatch check: ") for line in lines)
    assert "has none: give the folder" in lines[0]
    assert "does not exist" in lines[1]
    _, cases = read((tmp_path / "r.xml").read_bytes())
    assert verdict(cases["nothing", "readable"]) == verdict(cases["gone", "readable"]) == "error"
    assert verdict(cases["broken", "nonfinite"]) == "failure"

    code, out, _ = call("nothing", "healthy", "--format", "json")
    document = json.loads(out)
    assert (code, document["runs"]) == (2, ["healthy"])
    assert sum(note.startswith("nothing was not judged: ") for note in document["notes"]) == 1


def test_a_report_that_cannot_be_written_is_one_line(call: Callable[..., Result], runs: Path) -> None:
    (runs / "file").write_text("x")
    for place in (runs, runs / "file" / "report.xml"):
        code, _, err = call("healthy", "--junit", place)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"cannot be written to {place}" in err


@pytest.mark.parametrize("option", ["--junit=r.xml", "--format=github", "--format=markdown"])
def test_follow_makes_no_reports(call: Callable[..., Result], option: str) -> None:
    code, out, err = call("healthy", "--follow", option)
    assert (code, out) == (2, "")
    assert "check the runs once more" in err


# GitHub -----------------------------------------------------------------------------------------------------


def as_the_runner_reads(line: str) -> tuple[str, str, str]:
    """Command, title and message, parsed as GitHub's runner does; ("", "", line) of other lines."""
    if not line.lstrip().startswith("::"):
        assert "##[" not in line  # the older commands count anywhere in a line
        return "", "", line
    head, _, message = line.lstrip()[2:].partition("::")
    command, _, properties = head.partition(" ")
    (title,) = [one.removeprefix("title=") for one in properties.split(",")]
    for code, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        title = title.replace(code, character)
        message = message.replace(code, character) if code not in ("%3A", "%2C") else message
    return command, title, message


def test_annotations_name_problem_and_run(call: Callable[..., Result]) -> None:
    code, out, err = call("broken", "nothing", "--fail-on", "critical", "--format", "github")
    assert code == 2
    assert len(err.splitlines()) == 1
    read = [as_the_runner_reads(line) for line in out.splitlines()]
    commands = [command for command, _, _ in read]
    assert commands == sorted(
        commands, key=("error", "warning", "notice", "").index
    )  # ten of a kind are shown
    titles = {title: (command, message) for command, title, message in read}
    command, message = titles["nonfinite in broken"]
    assert command == "error"
    assert Run("broken").findings()[0].advice in message
    assert titles["nothing was not judged"][0] == "error"
    assert titles["notes on broken"][0] == "notice"
    assert re.fullmatch(r"layerwatch: 2 runs, \d+ alarms?, 1 run that cannot be read", read[-1][2])


@pytest.mark.parametrize(
    ("severity", "fail_on", "kind"),
    [
        ("critical", None, "error"), ("warning", "critical", "warning"), ("warning", "warning", "error"),
        ("info", "warning", "notice"),
    ],
)  # fmt: skip
def test_what_fails_the_step_is_an_error(severity: str, fail_on: str | None, kind: str) -> None:
    finding = replace(FINDING, severity=severity)
    assert as_the_runner_reads(github([replace(CHECKED, findings=[finding])], fail_on)[0])[0] == kind


def test_no_text_of_a_run_becomes_a_command() -> None:
    odd = "50%, a: b\r\n::set-env name=PATH::/tmp\u2028::stop-commands::x\n##[add-path]/tmp"
    finding = replace(FINDING, summary=odd, layers=(odd,))
    checked = [Checked(odd, odd, 1, [finding], [odd]), Checked(odd, error=odd)]
    lines = github(checked, "critical")
    assert len(lines) == 4
    assert all(len(line.splitlines()) == 1 for line in lines)
    for command, title, message in map(as_the_runner_reads, lines[:-1]):
        assert command in ("error", "notice")
        assert " ".join(odd.split()) in title
        assert "50%, a: b\n::set-env name=PATH::/tmp\n" in message


def test_the_summary_of_a_job_is_appended(
    call: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert call("broken", "healthy", "--fail-on", "critical", "--format", "github")[0] == 1
    text = summary.read_text()
    assert text.startswith("before\n### layerwatch check: 1 of 2 failed\n")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    assert (
        text.removeprefix("before\n")
        == call("broken", "healthy", "--fail-on", "critical", "--format", "markdown")[1]
    )


def test_markdown_is_a_table_in_which_nothing_of_a_run_is_markup() -> None:
    odd = "`a` | <img src=x> @team [x](y)"
    finding = replace(FINDING, summary=odd, layers=(odd,))
    text = markdown([Checked(odd, odd, 1, [finding], [odd]), Checked("gone", error=odd)], "critical")
    assert "2 of 2 failed" in text
    assert "<img" not in re.sub(r"`[^`]*`", "", text)  # in code it is text
    assert "@team" not in re.sub(r"`[^`]*`", "", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6, 6, 6]
    assert markdown([Checked("a", "a", 9)], None).startswith("### layerwatch check: 1 passed\n")


def test_the_commands_of_the_page_are_ours(checkout: Path) -> None:
    from layerwatch.cli import build_parser

    page = (checkout / "docs" / "gates.md").read_text(encoding="utf-8")
    commands = re.findall(r"^layerwatch (.+?)(?: {2,}#.*)?$", page, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        build_parser().parse_args(shlex.split(command.split(" >> ")[0]))
