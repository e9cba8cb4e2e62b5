"""Figures that are understood at a glance and have the same bytes each time: labelled curves, and whole fleets.

No window system is needed, and matplotlib's settings are left unchanged. Colours follow Okabe and Ito (2008), so that
they remain distinct for colour-blind readers; markers and widths differ as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from mtz_core.grouping.affinity import Affinities
from mtz_core.grouping.groups import Grouping
from tasks.files import whole_file

_LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#8C6BB1", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#333333", "X"),
)
_INK, _FAINT = "#333333", "#8A8A8A"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": "#E6E6E6",
    "svg.hashsalt": "mtz",
    "svg.fonttype": "path",
}
_WIDTH, _HEIGHT, _LEAST_WIDTH, _HEADING = 3.5, 3.5, 7.0, 1.0
"""Inches, for the width of a README: a panel's width and height, a figure's least width, the height of the texts."""

_DPI, _LETTER, _TITLE_LETTER = 160, 0.093, 0.116
"""Pixels per inch; inches per letter of a curve's name, and of the title."""

_PERCENTS = (1, 2, 3, 5, 7, 10, 15, 25, 35, 50, 75, 100, 150, 200, 300, 400)
_POINTS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)
_LINEAR_TO, _ALL_LINEAR_TO = 1.0, 3.0
"""Points: the scale is linear up to the first, and logarithmic beyond it if a rise exceeds the second."""

_THINNER, _THINNEST = 0.66, 0.25
"""Each line's width relative to the one that it is drawn over; the least width relative to the first line."""

_GAP = 8.0
"""Distance between a line's end and its name, in typographic points."""

_SPOTS = tuple(
    product((-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.6, -0.6, 1.0, -1.0, 1.4, -1.4, 1.8, -1.8))
)
"""Where a name may stand: how far right and up of the line's end; ±1 is beside it, or above it."""


_CELLS, _LEAST_CELL, _MOST_CELL = 8.0, 0.135, 0.6
"""Inches: the size of a matrix, as long as its cells are neither smaller nor larger than the other two."""

_VALUES_TO = 14
"""The most models for which the similarity is written in the cells."""

_SHADES = LinearSegmentedColormap.from_list("similarity", ["#FFFFFF", "#CFE3F3", "#5BA3D0", "#08519C"]).with_extremes(
    bad="#EDEDED"
)
_DARK = 0.6
"""Letters on darker shades than this are white."""

_SCALE, _BELOW = 3.0, 0.65
"""Inches: the width of the scale, and the height of everything below a matrix."""


@dataclass(frozen=True)
class Curve:
    """A named line through at least one point.

    Attributes:
        name: The label.
        x: Stored bytes in percent, above 0.
        y: Rise of the error in percentage points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves to compare.

    Attributes:
        title: What they are about.
        curves: The curves.
    """

    title: str
    curves: Sequence[Curve]


def draw_curves(
    path: Path,
    panels: Sequence[Panel],
    *,
    title: str,
    x_label: str,
    y_label: str,
    zero: str = "originals",
    note: str = "",
    columns: int | None = None,
) -> None:
    """Draw panels side by side; a curve has the same colour and marker in all panels.

    Args:
        path: The SVG or PNG file, by its suffix.
        panels: The panels.
        title: Title of the figure.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        zero: Label of the dotted line at 0.
        note: A text below the figure.
        columns: Panels in a row; all by default.
    """
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    looks = {name: _LOOKS[number % len(_LOOKS)] for number, name in enumerate(names)}
    across = columns or len(panels)
    rows = ceil(len(panels) / across)
    with _own_style():
        width = max(_LEAST_WIDTH, _WIDTH * across)
        figure = Figure((width, _HEIGHT * rows + _HEADING), dpi=_DPI, layout="constrained", facecolor="white")
        grid = figure.subplots(rows, across, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        _scale(grid[0, 0], panels, room=min(0.4, (_LETTER * max(map(len, names), default=0) + 0.15) * across / width))
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel, looks, zero)
        figure.suptitle(fill(title, int(width / _TITLE_LETTER)), x=0.01, ha="left", fontsize=13, fontweight="bold")
        figure.supxlabel(f"{x_label}\n{note}" if note else x_label, fontsize=11)
        figure.supylabel(y_label, fontsize=11)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, panel in zip(grid.flat, panels, strict=False):
            _name_lines(axes, panel, looks)
        _save(figure, path)


@contextmanager
def _own_style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings must not change the figure
        matplotlib.rcParams.update(_STYLE)
        yield


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG or PNG file, by its suffix, without the time of writing."""
    kind = path.suffix.removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=_DPI, metadata=metadata)


def _scale(axes: Axes, panels: Sequence[Panel], room: float) -> None:
    """Set the scales, limits and ticks that all panels share; `room` is the part of the width for names on the left."""
    x = [value for panel in panels for curve in panel.curves for value in curve.x]
    y = [value for panel in panels for curve in panel.curves for value in curve.y]
    most, least = max(x, default=100.0), min(x, default=10.0)
    top, bottom = max((*y, 0.5)), min((*y, 0.0))
    axes.set_xscale("log")
    right = most * 1.06
    axes.set_xlim(right / (right / least) ** (1 / (1 - room)), right)
    axes.xaxis.set_major_locator(FixedLocator([value for value in _PERCENTS if least * 0.98 <= value <= most * 1.02]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if top > _ALL_LINEAR_TO:
        axes.set_yscale("symlog", linthresh=_LINEAR_TO)
        ticks = (*(-value for value in _POINTS[:0:-1]), *_POINTS)
        axes.yaxis.set_major_locator(FixedLocator([value for value in ticks if value >= bottom]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    height = axes.transData.transform([(most, bottom), (most, top)])[:, 1]
    margins = height[0] - 0.1 * (height[1] - height[0]), height[1] + 0.06 * (height[1] - height[0])
    axes.set_ylim(*(float(axes.transData.inverted().transform((0, value))[1]) for value in margins))


def _draw(axes: Axes, panel: Panel, looks: dict[str, tuple[str, str]], zero: str) -> None:
    axes.set_title(panel.title, loc="left", fontsize=12)
    axes.grid(True, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color=_INK, linestyle=(0, (1, 2)), linewidth=1.4)
    left = axes.get_yaxis_transform()
    axes.annotate(zero, (0, 0), (4, -3), xycoords=left, textcoords="offset points", va="top", fontsize=10)
    for number, curve in enumerate(panel.curves):
        colour, marker = looks[curve.name]
        thinner = max(_THINNER**number, _THINNEST)  # so that coinciding lines all stay visible
        axes.plot(
            curve.x,
            curve.y,
            color=colour,
            marker=marker,
            markersize=9.5 * thinner**0.7,
            linewidth=4.8 * thinner,
            markeredgewidth=0,
            clip_on=False,
        )


def _name_lines(axes: Axes, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    """Write each curve's name beside its leftmost point, where it covers the least of lines and other names."""
    lines = [_pixels(axes, curve) for curve in panel.curves]
    ink = np.concatenate([*lines, np.empty((0, 2))])
    taken = [text.get_window_extent() for text in axes.texts]
    ends = [min(zip(curve.x, curve.y, strict=True)) for curve in panel.curves]
    for curve, end in sorted(zip(panel.curves, ends, strict=True), key=lambda pair: -pair[1][1]):
        colour, _ = looks[curve.name]
        label = axes.annotate(
            curve.name,
            end,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            annotation_clip=False,
            color=colour,
            fontweight="bold",
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )
        box = label.get_window_extent()
        steps = np.array([box.width, box.height]) / 2 + _GAP * _DPI / 72
        boxes = {spot: box.padded(2).translated(*(steps * spot)) for spot in _SPOTS}

        def cost(spot: tuple[float, float], boxes: dict[tuple[float, float], Bbox] = boxes) -> float:
            box = boxes[spot]
            covered = ((ink > box.min) & (ink < box.max)).all(axis=1).sum()
            bad = sum(box.overlaps(other) for other in taken) + sum(not axes.bbox.contains(*c) for c in box.corners())
            return float(covered + 100 * bad + 4 * (1 + spot[0]) + 5 * abs(spot[1]))

        best = min(_SPOTS, key=cost)
        label.xyann = tuple(steps * best * 72 / _DPI)
        taken.append(boxes[best])


def _pixels(axes: Axes, curve: Curve) -> Float[np.ndarray, "n 2"]:
    """Return points along a line, one typographic point from each other, in pixels of the figure."""
    corners = axes.transData.transform(sorted(zip(curve.x, curve.y, strict=True)))
    lengths = np.hypot(*np.diff(corners, axis=0).T)
    far = np.concatenate([[0.0], np.cumsum(lengths)])
    along = np.arange(0, far[-1] + 1, _DPI / 72)
    return np.stack([np.interp(along, far, corners[:, axis]) for axis in (0, 1)], axis=1)


def draw_fleet(affinities: Affinities, grouping: Grouping, file: Path, names: Sequence[str] = ()) -> None:
    """Draw the similarity of every two models, sorted by group.

    Groups are outlined and named. Models that are left alone have grey names; pairs that cannot be compared are grey.

    Args:
        affinities: The affinities of all pairs.
        grouping: The groups.
        file: The SVG or PNG file, by its suffix.
        names: Names of the groups, in their order; numbers by default.
    """
    names = names or [f"group {number}" for number in range(1, len(grouping.groups) + 1)]
    alone = [one.model for one in grouping.alone]
    order = [*(model for group in grouping.groups for model in group.models), *alone]
    with _own_style():
        blocks = [
            (f"{name}: {len(group.models)} models, saves {100 * group.saved / group.bytes:.0f} %", len(group.models))
            for group, name in zip(grouping.groups, names, strict=True)
        ]
        blocks += [(f"alone: {len(alone)}", len(alone))] if alone else []
        right = _LETTER * max((len(text) for text, _ in blocks), default=0) + 0.3
        figure, axes = _matrix(affinities, order, alone, grouping.limits.similarity, right)
        start = 0
        for number, (text, count) in enumerate(blocks):
            colour = _LOOKS[number % len(_LOOKS)][0] if number < len(names) else _FAINT
            if number < len(names):
                _outline(axes, start, count, colour)
            _name_block(axes, len(order), start + (count - 1) / 2, text, colour)
            start += count
        _save(figure, file)


def _matrix(
    affinities: Affinities, order: Sequence[str], alone: Sequence[str], limit: float, right: float
) -> tuple[Figure, Axes]:
    """Return a figure with the matrix, the models' names and the scale; `right` is the free space in inches."""
    count = len(order)
    cell = min(max(_CELLS / max(count, 1), _LEAST_CELL), _MOST_CELL)
    letter = min(11.0, 0.85 * cell * 72)
    side, room = cell * count, letter / 11 * _LETTER * max(map(len, order), default=0) + 0.2
    width, height = room + max(side, _SCALE) + right, room + side + _BELOW
    figure = Figure((width, height), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((room / width, _BELOW / height, side / width, side / height))
    values = _similarities(affinities, order)
    axes.imshow(np.ma.masked_invalid(values), cmap=_SHADES, vmin=0, vmax=1, interpolation="none")
    axes.xaxis.tick_top()
    axes.set_xticks(range(count), order, rotation=90, fontsize=letter)
    axes.set_yticks(range(count), order, fontsize=letter)
    axes.tick_params(length=0, pad=3)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_color(_FAINT if label.get_text() in alone else _INK)
    if count <= _VALUES_TO:
        for row, column in zip(*np.nonzero(~np.isnan(values) & ~np.eye(count, dtype=bool)), strict=True):
            value = values[row, column]
            colour = "white" if value > _DARK else _INK
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=0.85 * letter, color=colour)
    _scale_of_shades(figure.add_axes((room / width, 0.35 / height, _SCALE / width, 0.12 / height)), limit)
    return figure, axes


def _scale_of_shades(axes: Axes, limit: float) -> None:
    """Draw the scale of the shades, with the least similarity that groups may have."""
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=_SHADES, extent=(0, 1, 0, 1), aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_xticks([0, 1], ["0", "100 %"], fontsize=9)
    axes.axvline(limit, color=_INK, linewidth=1.5)
    text = f"in common; {100 * limit:g} % at least"
    axes.annotate(text, (0.5, 0), (0, -4), textcoords="offset points", ha="center", va="top", fontsize=9)


def _similarities(affinities: Affinities, order: Sequence[str]) -> Float[np.ndarray, "n n"]:
    """Return the matrix of similarities, NaN where models cannot be compared."""
    values = np.eye(len(order))
    for i, j in combinations(range(len(order)), 2):
        pair = affinities.of(order[i], order[j])
        values[i, j] = values[j, i] = pair.similarity if pair.comparable else np.nan
    return values


def _outline(axes: Axes, start: int, count: int, colour: str) -> None:
    corner = start - 0.5, start - 0.5
    frame = Rectangle(corner, count, count, fill=False, edgecolor=colour, linewidth=2.5, clip_on=False)
    frame.set_path_effects([withStroke(linewidth=5, foreground="white")])
    axes.add_patch(frame)


def _name_block(axes: Axes, size: int, middle: float, text: str, colour: str) -> None:
    """Write the name of a block of rows beside the matrix."""
    axes.annotate(
        text,
        (size - 0.5, middle),
        (6, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        color=colour,
        fontsize=9,
        fontweight="bold",
    )
