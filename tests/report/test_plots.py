import numpy as np
import pytest

from asserts import texts
from rankwise.pictures import style
from rankwise.report import curves, plots
from rankwise.report.curves import Line
from rankwise.report.plots import Point, Tried
from rankwise.results.tuning import Rate


def test_methods_of_equal_size_stand_side_by_side() -> None:
    points = [Point("a", 0, 1000, 0.7, (0.68, 0.72)), Point("b", 1, 1000, 0.72), Point("head", 2, 0, 0.5, (0.49, 0.51))]
    figure = plots.score_by_parameters(points, "accuracy", "bars: something")
    figure.canvas.draw()
    axes = figure.axes[0]
    places_on_paper = [bar.lines[0].get_window_extent().x0 for bar in axes.containers]
    assert len({round(place) for place in places_on_paper}) == 3
    assert axes.get_xlabel() and axes.get_ylabel() == "accuracy"
    for point in points:
        low, high = axes.get_ylim()
        assert all(low < end < high for end in point.bar or (point.score,))


def test_sizes_far_apart_get_a_logarithmic_axis() -> None:
    far = [Point("small", 0, 1e4, 0.7), Point("large", 1, 1e8, 0.8)]
    assert plots.score_by_parameters(far, "f1", "").axes[0].get_xscale() == "log"


def test_several_sizes_of_one_method_are_joined_and_moved_as_one() -> None:
    points = [
        Point(label, look, size, 0.7, (0.68, 0.72)) for look, label in enumerate("ab") for size in (4e5, 1e5, 2e5)
    ]
    figure = plots.score_by_parameters([*points, Point("c", 2, 1e7, 0.8)], "accuracy", "")
    figure.canvas.draw()
    lines = [bar.lines[0] for bar in figure.axes[0].containers]
    assert [line.get_linestyle() != "None" for line in lines] == [True, True, False]
    assert list(lines[0].get_xdata()) == [1e5, 2e5, 4e5]
    one, other = (line.get_transform().transform(line.get_xydata()) for line in lines[:2])
    gaps = other[:, 0] - one[:, 0]
    assert gaps[0] > 1 and np.ptp(gaps) < 1e-6
    assert [text for text in texts(figure) if text in "abc" and text] == ["a", "b", "c"]


@pytest.mark.parametrize("quickest", [92.5, 0.02, 0.0])
def test_cost_is_drawn_within_its_axes_with_round_ticks(quickest: float) -> None:
    seconds = [Point("a", 0, quickest, 0.7, (0.6, 0.8)), Point("b", 1, 380.0, 0.6)]
    memory = [Point("a", 0, 700 * 2**20, 0.7, (0.6, 0.8)), Point("b", 1, 3 * 2**30, 0.6)]
    figure = plots.score_by_cost(seconds, memory, "accuracy", "bars")
    for axes, points in zip(figure.axes, (seconds, memory), strict=True):
        low, high = axes.get_xlim()
        assert all(low + 0.02 * (high - low) < point.x < high for point in points)
        assert 1 < len(axes.get_xticks()) < 6 and min(axes.get_xticks()) >= 0
    shown = texts(figure)
    assert {"2 min", "1 GiB", "time of a run", "peak memory"} <= set(shown)


@pytest.mark.parametrize("values", [(0.0, 0.0), (1e-3, 1e-3), (5.0, 5.0), (1.2, 1.9), (3e5, 3e5), (3e5, 3.1e5)])
def test_costs_that_are_alike_have_a_scale_too(values: tuple[float, float]) -> None:
    points = [Point(name, look, value, 0.7) for look, (name, value) in enumerate(zip("ab", values, strict=True))]
    figure = plots.score_by_cost(points, points, "accuracy", "")
    style.svg(figure)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert len(axes.get_xticks()) >= 2 and all(low <= each <= high for each in (*values, *axes.get_xticks()))


def rate(learning_rate: float, *scores: float) -> Rate:
    return Rate(learning_rate, dict(enumerate(scores)))


def test_the_rate_that_was_chosen_has_a_ring_and_the_seeds_their_spread() -> None:
    methods = [
        Tried("a", 0, [rate(1e-2, 0.58, 0.6, 0.62), rate(1e-3, 0.7), rate(1e-4, 0.49, 0.5, 0.51)], 1e-3),
        Tried("b", 1, [rate(1e-3, 0.3, 0.5), rate(3e-3, 0.4, 0.6)]),
    ]
    figure = plots.score_by_rate(methods, "accuracy")
    axes = figure.axes[0]
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none" and len(line.get_xdata())]
    assert [(list(ring.get_xdata()), list(ring.get_ydata())) for ring in rings] == [([1e-3], [0.7])]
    bars = axes.containers[0].lines[2][0].get_segments()
    spreads = [np.ptp(bar[:, 1]) for bar in bars if len(bar) and np.isfinite(bar).all()]
    np.testing.assert_allclose(sorted(spreads), [0.02, 0.04])
    assert axes.get_xscale() == "log" and {"0.0001", "0.001", "0.01"} <= set(texts(figure))
    low, high = axes.get_ylim()
    assert low < 0.3 and high > 0.72
    assert any("ring: the rate chosen" in text for text in texts(figure))


def test_panels_stand_by_rank_and_rate_with_equal_axes_and_one_legend() -> None:
    line = [Line("a", 0, [([1, 2], [0.1, 0.2])]), Line("b", 1, [([1, 2], [0.3, 0.9]), ([1, 2], [0.5, 0.7])])]
    cells = {(rank, rate): line for rank in (8, 1) for rate in (1e-3, 1e-4, 5e-3)}
    del cells[8, 1e-4]
    figure = curves.panels(cells, "loss", "title")
    assert len(figure.axes) == 6 and len({axes.get_ylim() for axes in figure.axes}) == 1
    assert [axes.get_title("center") for axes in figure.axes[:3]] == ["rate 0.0001", "rate 0.001", "rate 0.005"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["rank 1", "rank 8"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2, 0, 2, 2]
    assert texts(figure).count("no run") == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="no curves"):
        curves.panels({}, "loss", "title")


@pytest.mark.parametrize("name", ["$x_{", "a\nb\x00\x1b", "名前 🙂", '<&">', "y" * 900, "_", ""])
def test_any_name_can_be_drawn_and_widens_nothing(name: str) -> None:
    line = [([1, 2], [0.1, 0.2])]
    plain = style.svg(curves.curves([Line("a", 0, line)], "loss", "title"))
    odd = style.svg(curves.curves([Line(name, 0, line)], name, name))
    widths = [float(text.partition('width="')[2].partition("pt")[0]) for text in (plain, odd)]
    assert widths[1] < 1.1 * widths[0]


def test_mean_and_spread_use_the_steps_that_all_seeds_have() -> None:
    steps, mean, spread = curves.mean_and_spread([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 9.0])])
    np.testing.assert_array_equal(steps, [2, 3])
    np.testing.assert_allclose(mean, [3, 4])
    assert spread is not None
    np.testing.assert_allclose(spread, [np.sqrt(2), np.sqrt(2)])
    assert curves.mean_and_spread([([1], [2.0])])[2] is None
    assert len(curves.mean_and_spread([([], [])])[0]) == 0


def test_curves_say_what_the_band_is_only_when_there_is_one() -> None:
    one = curves.curves([Line("a", 0, [([1, 2], [0.1, 0.2])])], "loss", "title")
    two = curves.curves([Line("a", 0, [([1, 2], [0.1, 0.2]), ([1, 2], [0.3, 0.2])])], "loss", "title")
    assert not any("band" in text for text in texts(one))
    assert any("sample standard deviation" in text for text in texts(two))


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (999, "999"), (331_776, "332k"), (1_327_104, "1.33M")])
def test_short_counts(value: float, shown: str) -> None:
    assert plots.short_count(value) == shown
