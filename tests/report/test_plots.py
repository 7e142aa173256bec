from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankwise.report import plots
from rankwise.report.plots import Line, Place, Point, places

RANKS = {f"encoder.layer.{layer}.attention.self.{name}": layer + 1 for layer in range(3) for name in ("query", "value")}


def texts(figure) -> list[str]:  # type: ignore[no-untyped-def]
    import matplotlib.text

    return [each.get_text() for each in figure.findobj(matplotlib.text.Text)]


def test_bert_sites_get_short_names_that_tell_them_apart() -> None:
    endings = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    found = places([*(f"bert.encoder.layer.1.{end}" for end in endings), "bert.pooler.dense"])
    assert list(found.values()) == [
        Place(1, "query"),
        Place(1, "attention.output"),
        Place(1, "intermediate"),
        Place(1, "output"),
        Place(None, "pooler"),
    ]


def test_llama_gpt2_and_t5_sites() -> None:
    llama = places(["model.layers.11.self_attn.q_proj", "model.layers.11.mlp.gate_proj"])
    assert list(llama.values()) == [Place(11, "q_proj"), Place(11, "gate_proj")]
    assert places(["transformer.h.0.attn.c_attn"]) == {"transformer.h.0.attn.c_attn": Place(0, "c_attn")}
    t5 = places(
        [
            "encoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.0.SelfAttention.q",
            "decoder.block.0.layer.1.EncDecAttention.q",
            "lm_head",
        ]
    )
    assert [place.projection for place in t5.values()] == [
        "encoder SelfAttention.q",
        "decoder SelfAttention.q",
        "decoder EncDecAttention.q",
        "lm_head",
    ]


@pytest.mark.parametrize(
    "names", [["0.dense", "1.dense"], ["a.dense", "a.b.dense"], ["dense"], ["layer.0.dense", "dense"]]
)
def test_no_two_sites_of_a_layer_share_a_name(names: list[str]) -> None:
    assert len(set(places(names).values())) == len(names)


def test_the_rank_picture_shows_every_rank(tmp_path: Path) -> None:
    figure = plots.rank_picture({**RANKS, "encoder.layer.0.attention.self.query": 0}, tmp_path / "made" / "ranks.png")
    shown = texts(figure)
    assert {"0", "1", "2", "3", "query", "value", "rank", "projection"} <= set(shown)
    with Image.open(tmp_path / "made" / "ranks.png") as image:
        assert image.width > 600
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["ranks.png"]


def test_the_rank_picture_can_be_an_svg_and_repeats_itself(tmp_path: Path) -> None:
    plots.rank_picture(RANKS, tmp_path / "a.svg")
    plots.rank_picture(RANKS, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ranks"):
        plots.rank_picture({})
    with pytest.raises(ValueError, match="empty"):
        plots.ranks_over_time([], 10)


@pytest.mark.parametrize("top", [1, 8, 64])
def test_ranks_of_any_size_can_be_drawn(top: int) -> None:
    plots.svg(plots.rank_picture(dict.fromkeys(RANKS, top)))
    plots.svg(plots.rank_picture(dict.fromkeys(RANKS, 0)))


def test_the_heat_map_has_a_row_per_site_and_a_column_per_change() -> None:
    history = [(0, RANKS), (20, {**RANKS, "encoder.layer.2.attention.self.value": 0}), (40, RANKS)]
    figure = plots.ranks_over_time(history, 60)
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().shape == (6, 3)
    assert mesh.get_array()[5].tolist() == [3, 0, 3]
    assert figure.axes[0].get_xlim() == (0, 60)
    assert {"0   query", "2   query", "value"} <= set(texts(figure))


def test_the_heat_map_ends_soon_after_the_last_change_and_says_so() -> None:
    figure = plots.ranks_over_time([(0, RANKS), (10, {**RANKS, "encoder.layer.0.attention.self.query": 3})], 1000)
    assert figure.axes[0].get_xlim() == (0, 14)
    assert any("no change after step 10; the run ended at step 1000" in text for text in texts(figure))


def test_a_large_model_names_layers_only() -> None:
    many = {f"layers.{layer}.{name}": 4 for layer in range(40) for name in ("q", "k", "v", "o")}
    figure = plots.ranks_over_time([(0, many)], 10)
    assert len(figure.axes[0].get_yticks()) == 40
    plots.svg(plots.rank_picture(many))


def test_methods_of_equal_size_stand_side_by_side() -> None:
    points = [Point("a", 1000, 0.7, 0.02), Point("b", 1000, 0.72), Point("head", 0, 0.5, 0.01)]
    figure = plots.score_by_parameters(points, "accuracy", "bars: something")
    figure.canvas.draw()
    axes = figure.axes[0]
    places_on_paper = [bar.lines[0].get_window_extent().x0 for bar in axes.containers]
    assert len({round(place) for place in places_on_paper}) == 3
    assert axes.get_xlabel() and axes.get_ylabel() == "accuracy"
    for point in points:
        low, high = axes.get_ylim()
        assert low < point.score - point.error and point.score + point.error < high


def test_sizes_far_apart_get_a_logarithmic_axis() -> None:
    far = [Point("small", 1e4, 0.7), Point("large", 1e8, 0.8)]
    assert plots.score_by_parameters(far, "f1", "").axes[0].get_xscale() == "log"


def test_mean_and_spread_use_the_steps_that_all_seeds_have() -> None:
    steps, mean, spread = plots.mean_and_spread([([1, 2, 3], [1.0, 2.0, 3.0]), ([2, 3, 4], [4.0, 5.0, 9.0])])
    np.testing.assert_array_equal(steps, [2, 3])
    np.testing.assert_allclose(mean, [3, 4])
    assert spread is not None
    np.testing.assert_allclose(spread, [np.sqrt(2), np.sqrt(2)])
    assert plots.mean_and_spread([([1], [2.0])])[2] is None
    assert len(plots.mean_and_spread([([], [])])[0]) == 0


def test_curves_say_what_the_band_is_only_when_there_is_one() -> None:
    one = plots.curves([Line("a", [([1, 2], [0.1, 0.2])])], "loss", "title")
    two = plots.curves([Line("a", [([1, 2], [0.1, 0.2]), ([1, 2], [0.3, 0.2])])], "loss", "title")
    assert not any("band" in text for text in texts(one))
    assert any("sample standard deviation" in text for text in texts(two))


@pytest.mark.parametrize(("value", "shown"), [(0, "0"), (999, "999"), (331_776, "332k"), (1_327_104, "1.33M")])
def test_short_counts(value: float, shown: str) -> None:
    assert plots.short_count(value) == shown
