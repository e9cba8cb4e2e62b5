"""Figures of curves: the same bytes each time, every line named where it ends, nothing of a user's settings in them."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tasks.charts import Curve, Panel, draw_curves

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
