"""The pages of docs/problems: complete, exact, and readable from code."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerwatch.dashboard.quantities import QUANTITIES
from layerwatch.monitor import detectors
from layerwatch.monitor.detectors import Arrays, History, Unjudged, registered
from layerwatch.monitor.detectors.registry import FAMILIES
from layerwatch.monitor.findings import CAUSES
from layerwatch.monitor.problems import SECTIONS, closest, parse, problems

PAGES = problems()
#: Where detectors keep their thresholds.
MODULES = (*FAMILIES, "history", "outcome", "validation")


def defaults(code: str) -> dict[str, str]:
    """The rows of a page's table: constant -> value, as written."""
    _, _, table = PAGES[code].sections["The rule"].partition("### Defaults")
    return dict(re.findall(r"^\| `(\w+\.\w+)` \| `(.+?)` \|", table, flags=re.MULTILINE))


def constants() -> dict[str, object]:
    """Every public constant in capitals that a detector's module defines itself, as module.NAME."""
    found = {}
    for family in MODULES:
        module = importlib.import_module(f"{detectors.__name__}.{family}")
        tree = ast.parse(Path(str(module.__file__)).read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                    if name.isupper() and not name.startswith("_"):
                        found[f"{family}.{name}"] = getattr(module, name)
    return found


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    own = {
        problem for problem, function in registered()[0] if function.__module__.startswith(detectors.__name__)
    }
    assert own == set(CAUSES) == set(PAGES)


def test_the_page_of_detectors_links_every_problem_once() -> None:
    text = (Path(__file__).parents[2] / "docs" / "detectors.md").read_text("utf-8")
    assert sorted(re.findall(r"^\| .*\(problems/(\w+)\.md\)", text, flags=re.MULTILINE)) == sorted(PAGES)


@pytest.mark.parametrize("code", PAGES)
def test_a_page_has_a_title_one_sentence_and_every_section(code: str) -> None:
    page = PAGES[code]
    assert page.title
    assert page.title[0].isupper()
    assert tuple(page.sections) == SECTIONS
    assert all(len(text) > 40 for text in page.sections.values())
    assert page.rule.endswith(".")
    assert "\n" not in page.rule
    assert not re.search(r"\.\s+[A-Z]", page.rule), "the rule in short is one sentence"
    assert "### Defaults" in page.sections["The rule"]


@pytest.mark.parametrize("code", PAGES)
def test_defaults_are_those_of_the_code(code: str) -> None:
    known = constants()
    for name, value in defaults(code).items():
        assert name in known, f"{code}.md names {name}, which no detector has"
        assert ast.literal_eval(value) == known[name], f"{code}.md: {name} is {known[name]!r} in the code"


def test_every_threshold_of_the_code_is_on_a_page() -> None:
    named = {name for code in PAGES for name in defaults(code)}
    thresholds = {
        name
        for name, value in constants().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    assert thresholds - named == set(), "these constants are in no page's table of defaults"


@pytest.mark.parametrize("code", PAGES)
def test_links_lead_to_pages_and_views_that_exist(code: str) -> None:
    text = page_text(code)
    assert set(re.findall(r"\]\((\w+)\.md\)", text)) <= set(PAGES) - {code}
    assert PAGES[code].related
    views = re.findall(r"\*([^*]+)\*", PAGES[code].sections["How it shows"])
    assert set(views) <= {quantity.title for quantity in QUANTITIES.values()}
    assert not re.search(r"<\w+[^>]*>", re.sub(r"```.*?```", "", text, flags=re.DOTALL)), "no HTML"


@pytest.mark.parametrize("code", PAGES)
def test_a_list_stands_apart_from_the_paragraph_before(code: str) -> None:
    """Not every reader of Markdown sees a list otherwise: the dashboard's does not."""
    lines = re.sub(r"```.*?```", "", page_text(code), flags=re.DOTALL).splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"- |\d+\. ", line):
            assert not before.strip() or re.match(r"- |\d+\. |\s|#", before), f"{code}.md: {line[:50]}"


@pytest.mark.parametrize("code", PAGES)
def test_snippets_are_python(code: str) -> None:
    for snippet in re.findall(r"^ *```python\n(.*?)^ *```", page_text(code), flags=re.DOTALL | re.MULTILINE):
        indent = len(snippet) - len(snippet.lstrip(" "))
        ast.parse("\n".join(line[indent:] for line in snippet.splitlines()))


def test_the_detector_in_the_docs_works() -> None:
    text = (Path(__file__).parents[2] / "docs" / "detectors.md").read_text("utf-8")
    snippet = re.search(r"^```python\n(((?!```).)*?@detector.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert snippet
    space: dict[str, Any] = {}
    # Not registered here: the table is one for all tests.
    exec(snippet[1].replace('@detector("noisy_loss")\n', "").replace("-> Finding | None", ""), space)
    swing = np.abs(np.random.default_rng(0).standard_normal(60))
    made = [History(Arrays(losses={"train_loss": (range(60), loss.tolist())})) for loss in (swing, 5 + swing)]
    found, nothing = (space["noisy_loss"](history) for history in made)
    assert (found.first_step, found.severity, nothing) == (10, "warning", None)
    with pytest.raises(Unjudged):
        space["noisy_loss"](History(Arrays()))


def test_a_page_is_read_into_its_parts_and_written_with_other_links() -> None:
    page = parse(
        "a",
        "# Title\n\nIt is so.\n\n## What it is\n"
        "See [b](b_c.md), [x](../x.md).\n\n## Related problems\n- [b](b_c.md)\n",
    )
    assert (page.title, page.rule, list(page.sections)) == (
        "Title",
        "It is so.",
        ["What it is", "Related problems"],
    )
    assert page.related == ("b_c",)
    assert page.markdown("/problems/{}") == (
        "It is so.\n\n## What it is\nSee [b](/problems/b_c), x.\n\n## Related problems\n- [b](/problems/b_c)"
    )


def test_the_closest_code_of_a_slip() -> None:
    assert closest("vanishing") == "vanishing_gradients"
    assert closest("Exploding_Gradient") == "exploding_gradients"
    assert closest("zzzz") is None


def page_text(code: str) -> str:
    return PAGES[code].markdown()
