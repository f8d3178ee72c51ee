"""Every relative link in the documentation leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

#: What GitHub leaves out of the address of a heading, besides Markdown's own marks.
NO_ANCHOR = re.compile(r"[^\w\- ]")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Addresses of its headings, as GitHub makes them."""
    return {
        NO_ANCHOR.sub("", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    }


def test_links_to_headings_lead_to_one() -> None:
    broken = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)\s#:]*\.md|)#([^)\s]+)\)", prose(page)):
            if anchor not in anchors((page.parent / target) if target else page):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert broken == []


def test_relative_links_exist() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s#]+)", prose(page)):
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
