"""A matplotlib figure as a piece of a page: colours of the page's theme, values as tooltips."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
HINT = "hint:"
# Okabe and Ito's colours, which colour-blind people can tell apart, and the page's names for them
INK, FAINT, PAPER = "#1b1f24", "#d0d5db", "#ffffff"
STUDENT, TEACHER, REAL, ALARM, OTHER, FOURTH = (
    "#0072b2",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
    "#e69f00",
)
PALETTE = (STUDENT, REAL, TEACHER, OTHER, FOURTH, ALARM)
THEME = {
    INK: "ink",
    FAINT: "rule",
    PAPER: "card",
    STUDENT: "blue",
    TEACHER: "green",
    REAL: "vermilion",
    ALARM: "sky",
    OTHER: "purple",
    FOURTH: "amber",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "text.parse_math": False,  # names of arms are data
    "axes.formatter.useoffset": False,  # a tick says its value, not what to add to another
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3,
}


def hint(artist: Artist, texts: Sequence[str]) -> None:
    """Give each mark of an artist (points of a line, a bar) a tooltip on the page."""
    artist.set_gid(HINT + json.dumps(list(texts)))


def to_svg(figure: Figure, *, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: drawn with the colours of this module.
        name: makes its ids unique within the page.
        label: what it shows, for those who cannot see it.
    """
    file = StringIO()
    with mpl.rc_context({"svg.hashsalt": name, **STYLE}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314 - matplotlib's
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for defs in root.findall(f"{{{SVG}}}defs"):  # a style that would hold for the whole page
        for style in defs.findall(f"{{{SVG}}}style"):
            defs.remove(style)
    _add_hints(root)
    _unstyle(root)
    for size in ("width", "height"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": label})
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _add_hints(root: ElementTree.Element) -> None:
    """Tooltips onto marks; the groups' ids, the same in every figure, away."""
    for group in root.iter(f"{{{SVG}}}g"):
        name = group.attrib.pop("id", "")
        if not name.startswith(HINT):
            continue
        texts = json.loads(name.removeprefix(HINT))
        uses = list(group.iter(f"{{{SVG}}}use"))
        marks = uses or list(group.iter(f"{{{SVG}}}path"))
        for mark, text in zip(marks, texts, strict=False):  # a line's own path has no text
            mark.set("class", "hinted")
            ElementTree.SubElement(mark, f"{{{SVG}}}title").text = text


def _unstyle(root: ElementTree.Element) -> None:
    """Turn style attributes, which the page's policy forbids, into presentation attributes."""
    for element in root.iter():
        for rule in element.attrib.pop("style", "").split(";"):
            key, _, value = (part.strip() for part in rule.partition(":"))
            if key == "font":
                element.set("font-size", next(w for w in value.split() if w.endswith("px")))
            elif key:
                element.set(key, _themed(value))


def _themed(value: str) -> str:
    colour = THEME.get(value.lower())
    return f"var(--{colour})" if colour else value
