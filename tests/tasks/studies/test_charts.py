"""Figures: the same bytes each time, every line named where it ends and every group beside it, no user's settings."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from mtz_core.grouping.affinity import Affinities, Affinity
from mtz_core.grouping.groups import Grouping, Limits, choose_groups
from tasks.studies.charts import Curve, Panel, draw_curves, draw_fleet

X = (15.0, 25.0, 35.0, 50.0, 75.0, 100.0)
CURVES = (
    Curve("mixture", X, (4.1, 1.6, 0.8, 0.3, 0.05, 0.0)),
    Curve("drop only", X, (5.2, 2.1, 1.1, 0.5, 0.1, 0.0)),
    Curve("share only", X[3:], (1.9, 0.4, 0.0)),
    Curve("paper", X[3:], (27.0, 3.1, 0.0)),
)
PANELS = (
    Panel("digits", tuple(Curve(curve.name, curve.x, [0.2 * y for y in curve.y]) for curve in CURVES)),
    Panel("fashion", CURVES),
    Panel("mean", CURVES[::-1]),
)
TEXTS: dict[str, Any] = {"title": "what it costs", "x_label": "stored bytes", "y_label": "rise of the error"}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn, in place of their files."""
    found: list[Figure] = []

    def keep(figure: Figure, path: Path, **options: object) -> None:
        found.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", keep)
    return found


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_curves_give_the_same_bytes_whatever_a_user_has_set(tmp_path: Path, kind: str) -> None:
    first, second = tmp_path / f"first.{kind}", tmp_path / f"second.{kind}"
    draw_curves(first, PANELS, **TEXTS)
    with matplotlib.rc_context({"font.size": 30.0, "axes.facecolor": "black", "svg.hashsalt": "mine"}):
        draw_curves(second, PANELS, **TEXTS)
        assert matplotlib.rcParams["font.size"] == 30.0
    assert first.read_bytes() == second.read_bytes()
    assert not {b"dc:date", b"Software"} & {word for word in (b"dc:date", b"Software") if word in first.read_bytes()}
    draw_curves(second, PANELS[:2], **TEXTS)
    assert first.read_bytes() != second.read_bytes()


def test_every_line_is_named_once_in_each_panel_and_names_cover_nothing(tmp_path: Path, figures: list[Figure]) -> None:
    draw_curves(tmp_path / "figure.png", PANELS, **TEXTS)
    (figure,) = figures
    for axes, panel in zip(figure.axes, PANELS, strict=True):
        named = {text.get_text(): text.get_color() for text in axes.texts}
        assert sorted(named) == sorted(["originals", *(curve.name for curve in panel.curves)])
        drawn = {line.get_color() for line in axes.lines}
        assert all(named[curve.name] in drawn for curve in panel.curves)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_a_curve_looks_the_same_in_all_panels(tmp_path: Path, figures: list[Figure]) -> None:
    draw_curves(tmp_path / "figure.png", PANELS, **TEXTS)
    colours = [{text.get_text(): text.get_color() for text in axes.texts} for axes in figures[0].axes]
    assert colours[0] == colours[1] == colours[2]
    assert len(set(colours[0].values())) == 5


def test_panels_fill_rows_and_share_their_scales(tmp_path: Path, figures: list[Figure]) -> None:
    draw_curves(tmp_path / "figure.png", PANELS, **TEXTS, columns=2, note="paper cannot store less than 50 %")
    (figure,) = figures
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["digits", "fashion", "mean"]
    assert len({axes.get_ylim() for axes in figure.axes}) == len({axes.get_xlim() for axes in figure.axes}) == 1
    assert "paper cannot store less than 50 %" in figure.get_supxlabel()


def test_lines_that_end_in_one_point_are_named_apart(tmp_path: Path, figures: list[Figure]) -> None:
    curves = [Curve(name, (50.0, 100.0), (-0.3, 0.0)) for name in ("one", "two", "three", "four")]
    draw_curves(tmp_path / "figure.svg", [Panel("tied", curves)], **TEXTS)
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize(
    "curve",
    [
        Curve("one point", (50.0,), (0.0,)),
        Curve("better than the originals", (50.0, 100.0), (-1.5, 0.0)),
        Curve("useless", (1.0, 100.0), (90.0, 0.0)),
        Curve("larger", (50.0, 400.0), (0.1, 0.1)),
    ],
)
def test_extreme_curves(tmp_path: Path, curve: Curve) -> None:
    draw_curves(tmp_path / "figure.png", [Panel("panel", [curve])], **TEXTS)
    with Image.open(tmp_path / "figure.png") as image:
        assert 1000 < image.width < 1400


def fleet(count: int) -> tuple[Affinities, Grouping]:
    """Families of four, of which every third is of another topology; the last model belongs to none."""
    names = [f"model-{number:03d}" for number in range(count)]
    pairs = {}
    for i, j in combinations(range(count), 2):
        alike = i // 4 == j // 4 and j < count - 1
        found = Affinity(0.9 if alike else 0.1 + 0.3 * ((i * j) % 7) / 7, (0.01, 0.01), 100)
        other = (i // 4 % 3 == 2) != (j // 4 % 3 == 2)
        pairs[names[i], names[j]] = Affinity(0.0, (0.0, 0.0), 0, "their topologies differ") if other else found
    affinities = Affinities(dict.fromkeys(names, 150), {}, pairs)
    return affinities, choose_groups(affinities, Limits())


@pytest.mark.parametrize("count", [4, 100])
def test_a_fleet_is_drawn_with_every_model_named_and_its_groups_outlined_side_by_side(
    tmp_path: Path, figures: list[Figure], count: int
) -> None:
    affinities, grouping = fleet(count)
    names = [f"fleet-{number}" for number in range(len(grouping.groups))]
    draw_fleet(affinities, grouping, tmp_path / "fleet.svg", names)
    axes, scale = figures[0].axes
    order = [label.get_text() for label in axes.get_yticklabels()]
    assert sorted(order) == list(affinities.models)
    assert order == [label.get_text() for label in axes.get_xticklabels()]
    assert order[-1] == grouping.alone[0].model == affinities.models[-1]
    grey = {label.get_color() for label in axes.get_yticklabels()[-1:]}
    assert grey.isdisjoint(label.get_color() for label in axes.get_yticklabels()[:-1])
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    drawn = [order[round(frame.get_x() + 0.5) :][: int(frame.get_width())] for frame in frames]
    assert drawn == [list(group.models) for group in grouping.groups]
    beside = [text for text in axes.texts if ":" in text.get_text()]
    assert [text.get_text().split(":")[0] for text in beside] == [*names, "alone"]
    assert "60 % at least" in scale.texts[0].get_text()
    figures[0].draw_without_rendering()
    rows, columns, names_beside = (
        [label.get_window_extent() for label in labels]
        for labels in (axes.get_yticklabels(), axes.get_xticklabels(), beside)
    )
    for boxes in (rows, columns, names_beside):
        assert all(figures[0].bbox.contains(*corner) for box in boxes for corner in box.corners())
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_a_matrix_has_every_pair_and_leaves_out_what_cannot_be_compared(tmp_path: Path, figures: list[Figure]) -> None:
    affinities, grouping = fleet(13)
    draw_fleet(affinities, grouping, tmp_path / "fleet.svg")
    axes = figures[0].axes[0]
    order = [label.get_text() for label in axes.get_yticklabels()]
    shown = axes.images[0].get_array()
    assert shown is not None
    values = np.ma.masked_invalid(shown)
    cells = [text for text in axes.texts if text.get_text().isdigit()]
    written = {tuple(map(round, text.get_position())): text.get_text() for text in cells}
    for i, j in combinations(range(13), 2):
        pair = affinities.of(order[i], order[j])
        if pair.comparable:
            assert values[i, j] == values[j, i] == pair.similarity
            assert written[j, i] == written[i, j] == f"{100 * pair.similarity:.0f}"
        else:
            assert np.ma.getmaskarray(values)[i, j]
            assert (j, i) not in written


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_same_fleet_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    first, second = tmp_path / f"first.{kind}", tmp_path / f"second.{kind}"
    draw_fleet(*fleet(9), first)
    with matplotlib.rc_context({"font.size": 30.0, "image.cmap": "jet", "svg.hashsalt": "mine"}):
        draw_fleet(*fleet(9), second)
    assert first.read_bytes() == second.read_bytes()
    alone = Affinities({"only": 3}, {}, {})
    draw_fleet(alone, choose_groups(alone, Limits()), second)
    assert first.read_bytes() != second.read_bytes()
