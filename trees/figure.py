"""A draft tree as a picture: left to right, the accepted path green, the target's token yellow.

Everything is laid out in inches at one character width, so 8 nodes and 64 nodes have letters of the
same size, and the picture grows instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from specdec.errors import ConfigError
from specdec.trees.labels import Odds, escaped, visible
from specdec.trees.layout import Place, tidy_layout
from specdec.trees.tree import DraftTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT = "DejaVu Sans Mono"  # matplotlib brings it along; a fixed pitch, so widths are known
_PITCH = 0.602  # of its characters, in font sizes
_TOKEN_POINTS, _ODDS_POINTS, _LEGEND_POINTS = 9.0, 6.5, 7.5
_LONGEST_LABEL = 20  # characters
_ROW, _GAP, _BOX_HEIGHT, _BOX_PADDING, _MARGIN, _LEGEND_HEIGHT = 0.42, 0.42, 0.2, 0.06, 0.15, 0.3


class _Style(NamedTuple):
    name: str
    face: str
    edge: str
    text: str
    line_points: float


_ROOT = _Style("last token of the text", "#ffffff", "#24292f", "#24292f", 1.2)
_ACCEPTED = _Style("accepted", "#d5f0da", "#1a7f37", "#0b4a1e", 2.2)
_REJECTED = _Style("rejected", "#f4f5f6", "#c3c8ce", "#57606a", 0.8)
_NEXT = _Style("the target's own token", "#ffe680", "#b08800", "#4d3b00", 2.2)


def tree_figure(
    tree: DraftTree,
    path: Collection[int],
    decode: Callable[[int], str],
    next_token: int | None = None,
    target_probs: Sequence[float] | None = None,
) -> Figure:
    """Returns a matplotlib figure of the tree, larger for larger trees.

    Below a token stands what is known of its probabilities, ".62 → .91": the drafter's and the
    target's. White space is marked, what the font cannot show is escaped, long tokens are cut.

    Args:
        tree: the tree.
        path: accepted nodes, root not included.
        decode: gives a token's text.
        next_token: the target's own token behind the path, a node of its own at its end.
        target_probs: the target's probability of each node's token, from `Step.target_probs`.

    Raises:
        ConfigError: if matplotlib is not installed.
        TreeError: if `target_probs` has another length than the tree.
    """
    _require_matplotlib()
    from matplotlib.figure import Figure

    accepted = set(path)
    odds = Odds(tree, target_probs)
    parents, tokens = list(tree.parent_list), list(tree.token_list)
    styles = [_ACCEPTED if node in accepted else _REJECTED for node in range(len(tree))]
    styles[0] = _ROOT
    numbers = list(odds.texts)
    if next_token is not None:
        parents.append(max(accepted, default=0))
        tokens.append(next_token)
        styles.append(_NEXT)
        numbers.append("")
    labels = [_label(decode(token)) for token in tokens]
    places = tidy_layout(parents)

    widths = [_text_width(label, _TOKEN_POINTS) + 2 * _BOX_PADDING for label in labels]
    # numbers may be wider than their token; the column has room for either
    rooms = [max(w, _text_width(n, _ODDS_POINTS)) for w, n in zip(widths, numbers, strict=True)]
    lefts, rights = _columns(places, rooms)
    legend = _legend(styles, odds.legend)
    width = max(rights[-1], _legend_width(legend)) + _MARGIN
    num_rows = max(place.y for place in places) + 1
    height = _MARGIN + num_rows * _ROW + _LEGEND_HEIGHT

    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)  # inches from the top left corner
    ys = [_MARGIN + _BOX_HEIGHT / 2 + place.y * _ROW for place in places]
    # the rejected first, so that the accepted path lies on top
    order = sorted(range(len(tokens)), key=lambda node: styles[node].line_points)
    for node in order:
        parent, depth = parents[node], places[node].depth
        if parent >= 0:
            start = (lefts[depth - 1] + widths[parent], ys[parent])
            end = (lefts[depth], ys[node])
            _edge(axes, start, rights[depth - 1], end, styles[node])
    for node in order:
        left, style = lefts[places[node].depth], styles[node]
        _box(axes, left, ys[node], widths[node], labels[node], style)
        _text(
            axes, left, ys[node] + _BOX_HEIGHT / 2 + 0.085, numbers[node], _ODDS_POINTS, style.text
        )
    _draw_legend(axes, legend, height - _LEGEND_HEIGHT / 2)
    return figure


def save_tree(
    tree: DraftTree,
    path: Collection[int],
    decode: Callable[[int], str],
    next_token: int | None = None,
    target_probs: Sequence[float] | None = None,
    *,
    file: str | Path,
) -> None:
    """Writes `tree_figure` of the same arguments to a file, ``.svg`` or ``.png``.

    An SVG keeps its text as text, and the same tree gives the same bytes.

    Raises:
        ConfigError: for another suffix, a folder that does not exist, or without matplotlib.
    """
    file = check_figure_file(file)
    from matplotlib import rc_context

    figure = tree_figure(tree, path, decode, next_token, target_probs)
    if file.suffix.lower() == ".png":
        figure.savefig(file, dpi=160)
        return
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "specdec", "font.monospace": [_FONT]}):
        figure.savefig(file, format="svg", metadata={"Date": None})


def check_figure_file(file: str | Path) -> Path:
    """Returns the path if a figure can be saved there: for callers that have long work before it.

    Raises:
        ConfigError: see `save_tree`.
    """
    file = Path(file)
    if file.suffix.lower() not in (".svg", ".png"):
        raise ConfigError(f"a tree is saved as .svg or .png, got {file.name!r}")
    if not file.parent.is_dir():
        raise ConfigError(f"there is no folder {str(file.parent)!r} to save {file.name!r} in")
    _require_matplotlib()
    return file


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "pictures of trees need matplotlib: pip install specdec-toolkit[bench]; "
            "draw_tree draws in the terminal without it"
        ) from error


def _label(text: str) -> str:
    known = _characters()
    label = "".join(c if ord(c) in known else escaped(c) for c in visible(text))
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


@cache
def _characters() -> frozenset[int]:
    """Returns the code points that the font can show."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont(_FONT)).get_charmap())


def _text_width(text: str, points: float) -> float:
    return len(text) * points * _PITCH / 72


def _columns(places: Sequence[Place], rooms: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns where the column of each depth begins and ends: as wide as its widest node."""
    widest = [0.0] * (max(place.depth for place in places) + 1)
    for place, room in zip(places, rooms, strict=True):
        widest[place.depth] = max(widest[place.depth], room)
    lefts, rights, x = [], [], _MARGIN
    for room in widest:
        lefts.append(x)
        rights.append(x + room)
        x += room + _GAP
    return lefts, rights


def _edge(
    axes: Axes,
    start: tuple[float, float],
    column_end: float,
    end: tuple[float, float],
    style: _Style,
) -> None:
    """Goes straight to the end of the parent's column, so that it crosses no box, then bends."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    middle = (column_end + end[0]) / 2
    points = [start, (column_end, start[1]), (middle, start[1]), (middle, end[1]), end]
    codes = [Curve.MOVETO, Curve.LINETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]
    axes.add_patch(PathPatch(Curve(points, codes), fill=False, ec=style.edge, lw=style.line_points))


def _box(axes: Axes, left: float, y: float, width: float, label: str, style: _Style) -> None:
    from matplotlib.patches import FancyBboxPatch

    axes.add_patch(
        FancyBboxPatch(
            (left, y - _BOX_HEIGHT / 2),
            width,
            _BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.05",
            fc=style.face,
            ec=style.edge,
            lw=min(style.line_points, 1.4),
        )
    )
    if label:
        _text(axes, left + _BOX_PADDING, y, label, _TOKEN_POINTS, style.text)


def _text(axes: Axes, x: float, y: float, text: str, points: float, colour: str) -> None:
    # tokens are full of dollar signs, and not mathematics; who looks at an SVG may lack the font
    style: dict[str, Any] = {"parse_math": False, "usetex": False, "family": [_FONT, "monospace"]}
    if text:
        axes.text(x, y, text, fontsize=points, color=colour, va="center_baseline", **style)


def _legend(styles: Sequence[_Style], numbers: str) -> list[tuple[str, _Style | None]]:
    """Returns the legend's words and the style of the box before each; numbers have no box."""
    entries: list[tuple[str, _Style | None]] = [
        (style.name, style) for style in (_ROOT, _ACCEPTED, _REJECTED, _NEXT) if style in styles
    ]
    return [*entries, *([(f"numbers: {numbers}", None)] if numbers else [])]


def _legend_width(legend: Sequence[tuple[str, _Style | None]]) -> float:
    return _MARGIN + sum(_entry_width(*entry) for entry in legend)


def _entry_width(text: str, style: _Style | None) -> float:
    return (0.26 if style else 0.0) + _text_width(text, _LEGEND_POINTS) + 0.2


def _draw_legend(axes: Axes, legend: Sequence[tuple[str, _Style | None]], y: float) -> None:
    x = _MARGIN
    for text, style in legend:
        if style:
            _box(axes, x, y, 0.18, "", style)
        _text(axes, x + (0.26 if style else 0), y, text, _LEGEND_POINTS, _ROOT.text)
        x += _entry_width(text, style)
