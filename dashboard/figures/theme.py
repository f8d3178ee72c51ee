"""The look of every plot: one Plotly template a theme, and the few colours that mean something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

FONT = (
    'ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif'
)


@dataclass(frozen=True)
class Palette:
    """Colours of one theme. The same values are in assets/style.css for what is not a plot."""

    name: str
    text: str
    dim: str
    card: str
    grid: str
    line: str
    accent: str
    second: str
    third: str
    fourth: str
    critical: str
    warning: str
    info: str
    good: str
    scale: tuple[str, ...]  # sequential, low values close to the card's colour

    def severity(self, name: str) -> str:
        """The colour of a severity; the dim text colour for anything else."""
        return {"critical": self.critical, "warning": self.warning, "info": self.info}.get(name, self.dim)

    def colorscale(self) -> list[list[Any]]:
        """`scale` as Plotly wants it."""
        return [[i / (len(self.scale) - 1), color] for i, color in enumerate(self.scale)]


LIGHT = Palette(
    name="light",
    text="#1b2129",
    dim="#5c6672",
    card="#ffffff",
    grid="#eceef2",
    line="#d5d9e0",
    accent="#3558d4",
    second="#d9680f",
    third="#0f8b7d",
    fourth="#9a3fb5",
    critical="#d1242f",
    warning="#954800",
    info="#3b6fb6",
    good="#1a7f37",
    scale=("#f3f7f8", "#c9e5e2", "#8ccbcb", "#51a8bd", "#3480ad", "#2f5794", "#2b306a", "#1d1638"),
)
DARK = Palette(
    name="dark",
    text="#e3e7ed",
    dim="#98a3b1",
    card="#171b21",
    grid="#252b34",
    line="#39414d",
    accent="#86a3ff",
    second="#ffa657",
    third="#4fd1bd",
    fourth="#d69bee",
    critical="#ff6b6b",
    warning="#f0a648",
    info="#79b4f5",
    good="#4cc26a",
    scale=("#1a2028", "#2a2c57", "#2f4f8c", "#3077a8", "#3fa0b5", "#6cc6bd", "#b0e3cb", "#f1fbe6"),
)
PALETTES = {"light": LIGHT, "dark": DARK}


@dataclass(frozen=True)
class Style:
    """What a figure must know about the screen: its colours, and whether it is a phone's."""

    palette: Palette = LIGHT
    narrow: bool = False


def style_of(screen: dict[str, Any] | None) -> Style:
    """The style for what the browser said about itself ({"theme": "dark", "narrow": true})."""
    screen = screen or {}
    return Style(PALETTES.get(str(screen.get("theme")), LIGHT), bool(screen.get("narrow")))


def template(palette: Palette) -> dict[str, Any]:
    """The Plotly template of a theme (about 1 kB, against 6.6 kB of Plotly's default)."""
    axis = {
        "gridcolor": palette.grid,
        "linecolor": palette.line,
        "tickcolor": palette.line,
        "zerolinecolor": palette.grid,
        "zerolinewidth": 1,
        "exponentformat": "power",
        "minexponent": 4,
        "title": {"font": {"size": 12, "color": palette.dim}, "standoff": 8},
        "tickfont": {"size": 11, "color": palette.dim},
    }
    bar = {"outlinewidth": 0, "ticks": "", "thickness": 10, "tickfont": {"size": 11, "color": palette.dim}}
    lines = [palette.accent, palette.second, palette.third, palette.fourth, palette.dim]
    return {
        "layout": {
            "font": {"family": FONT, "size": 12, "color": palette.text},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": lines,
            "xaxis": axis | {"tickangle": 0},
            "yaxis": axis,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "hovermode": "x unified",
            "hoverlabel": {
                "bgcolor": palette.card,
                "bordercolor": palette.line,
                "font": {"family": FONT, "size": 12, "color": palette.text},
                "align": "left",
                "namelength": -1,
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "font": {"size": 12, "color": palette.dim},
            },
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": palette.line, "activecolor": palette.accent},
            "newshape": {"line": {"color": palette.accent}},
        },
        "data": {
            "heatmap": [{"colorscale": [list(pair) for pair in palette.colorscale()], "colorbar": bar}],
            "scatter": [{"line": {"width": 1.5}}],
        },
    }


TEMPLATES = {name: template(palette) for name, palette in PALETTES.items()}


def color_bar(title: str, style: Style) -> dict[str, Any]:
    """A slim horizontal colour bar above the plot, with its title over it."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "y": 1.0,
        "yanchor": "bottom",
        "ypad": 6,
        "len": 0.9 if style.narrow else 0.45,
        "thickness": 7,
        "title": {"text": title, "side": "top", "font": {"size": 12, "color": style.palette.dim}},
    }


def margin_bar(length: float, style: Style) -> dict[str, Any]:
    """A slimmer one in the margin above the plot; `length` is a share of its width."""
    return {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "xpad": 0,
        "yref": "container",
        "y": 1,
        "yanchor": "top",
        "ypad": 2,
        "len": length,
        "thickness": 8,
        "ticklabelposition": "outside top",
        "tickfont": {"size": 10, "color": style.palette.dim},
    }


def translucent(color: str, alpha: float) -> str:
    """`#rrggbb` as rgba with the given opacity."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha:g})"


def blend(first: str, second: str, share: float) -> str:
    """A colour between two of form `#rrggbb`; `share` of it is the second."""
    parts = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def message(text: str, style: Style, *, failed: bool = False) -> Figure:
    """No figure, and why: `layout.meta` holds what is said, in words, where the plot would be.

    `failed` offers another try; without it there is simply nothing to show.
    """
    hidden = {"visible": False, "fixedrange": True}
    tone = "failed" if failed else "empty"
    return {"data": [], "layout": {"xaxis": hidden, "yaxis": hidden, "meta": {"said": text, "tone": tone}}}


def wrap(text: str, width: int) -> str:
    """Break a sentence into lines with <br>, for Plotly's texts. Markup in it is shown, not interpreted."""
    lines, current = [], ""
    for word in text.replace("<", "&lt;").split():
        if current and len(current) + len(word) >= width:
            lines.append(current)
            current = word
        else:
            current = f"{current} {word}".strip()
    return "<br>".join([*lines, current])
