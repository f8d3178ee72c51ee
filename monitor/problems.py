"""The pages of docs/problems, one per problem code: what it is, how it shows, the rule, what to do.

They are the only place where a problem is described: `layerwatch explain` prints them, the dashboard shows
them. They are installed as package data of `layerwatch.problems`.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

#: What every page has, in this order.
SECTIONS = (
    "What it is", "How it shows", "The rule", "Known false alarms", "What to do", "Related problems",
)  # fmt: skip

_LINK = re.compile(r"\]\(([a-z_]+)\.md\)")
#: A link to a page that is not installed: its words remain.
_OUTSIDE = re.compile(r"\[([^]]+)\]\(\.\./[^)]+\)")


@dataclass(frozen=True)
class Problem:
    """The page of one problem code."""

    code: str
    title: str  # "Exploding gradients"
    rule: str  # one sentence
    sections: Mapping[str, str]  # heading -> Markdown, in the page's order

    def markdown(self, link: str | None = "{}.md") -> str:
        """The page below its title.

        Args:
            link: where the page of another code is, {} being the code; None gives names instead of links.
        """
        text = "\n\n".join((self.rule, *(f"## {name}\n{body}" for name, body in self.sections.items())))
        if link is None:
            return re.sub(r"\[([^]]+)\]\([^)]+\)", r"`\1`", text)
        return _LINK.sub(lambda found: f"]({link.format(found[1])})", _OUTSIDE.sub(r"\1", text))

    @property
    def related(self) -> tuple[str, ...]:
        """Codes that the page names as related, in its order."""
        return tuple(dict.fromkeys(_LINK.findall(self.sections["Related problems"])))


@functools.cache
def problems() -> Mapping[str, Problem]:
    """All pages by code, in the order of the alphabet."""
    folder = files("layerwatch.problems")
    pages = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".md")), key=lambda e: e.name)
    return {entry.name[:-3]: parse(entry.name[:-3], entry.read_text("utf-8")) for entry in pages}


def parse(code: str, text: str) -> Problem:
    """A page from its text: a title, a sentence, sections."""
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    title, rule = head.split("\n", 1)
    sections = (part.split("\n", 1) for part in rest)
    return Problem(
        code, title.removeprefix("# ").strip(), rule.strip(), {k.strip(): v.strip() for k, v in sections}
    )


def closest(code: str) -> str | None:
    """The known code that looks most like this one."""
    return next(iter(difflib.get_close_matches(code.lower(), problems(), n=1, cutoff=0.4)), None)
