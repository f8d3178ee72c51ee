"""What the commands print for people: no name or text of a log can steer the terminal.

Whoever may write to a folder of runs chooses the names of runs, layers and scalars, tags and notes. JSON is
printed as it is: its own escapes leave no control character in it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Columns of what is printed where there is no terminal.
WIDTH = 140


def tell(*lines: str, error: bool = False) -> None:
    """Print lines, at once: a name with a line break in it begins none of its own. error: on stderr."""
    from .monitor.wording import printable

    text = "\n".join(printable(_joined(line)) for line in lines)
    print(text, file=sys.stderr if error else sys.stdout, flush=True)


def complain(command: str, what: object) -> None:
    """One line on stderr: what is wrong."""
    tell(f"layerwatch {command}: {' '.join(str(what).split())}", error=True)


def plain(text: str) -> str:
    """For `say`: a text in one line, nothing in it is markup."""
    from rich.markup import escape

    return escape(_joined(text))


def _joined(text: str) -> str:
    return " ".join(text.splitlines())


def say(what: Any) -> None:
    """Print rich's markup, in which texts of a log are escaped, or a table."""
    console().print(what)


def console(width: int = WIDTH) -> Console:
    """Of standard output as it is now. width: columns where that is no terminal."""
    from rich.console import Console

    from .monitor.wording import printable

    class Printable(Console):
        """Cleans before the layout, so that columns stay in line."""

        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

    found = Printable(highlight=False)
    return found if found.is_terminal else Printable(highlight=False, width=width)


def new_table(*columns: str) -> Table:
    """An empty table; names fold instead of being cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        last = place == len(columns) - 1
        table.add_column(column, overflow="fold", ratio=1 if last and len(columns) == 5 else None)
    return table
