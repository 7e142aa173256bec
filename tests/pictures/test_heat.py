import numpy as np
import pytest

from asserts import texts
from rankwise.pictures import heat, style
from rankwise.pictures.heat import Place, places

RANKS = {f"encoder.layer.{layer}.attention.self.{name}": layer + 1 for layer in range(3) for name in ("query", "value")}


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


def test_the_rank_picture_shows_every_rank() -> None:
    figure = heat.rank_picture({**RANKS, "encoder.layer.0.attention.self.query": 0})
    assert {"0", "1", "2", "3", "query", "value", "rank", "projection"} <= set(texts(figure))


def test_the_rank_picture_repeats_itself() -> None:
    once, again = (style.svg(heat.rank_picture(RANKS)) for _ in range(2))
    assert once == again and "<svg" in once


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="no ranks"):
        heat.rank_picture({})
    with pytest.raises(ValueError, match="empty"):
        heat.ranks_over_time([], 10)
    with pytest.raises(ValueError, match="empty"):
        heat.ranks_in_steps([])


@pytest.mark.parametrize("top", [1, 8, 64])
def test_ranks_of_any_size_can_be_drawn(top: int) -> None:
    style.svg(heat.rank_picture(dict.fromkeys(RANKS, top)))
    style.svg(heat.rank_picture(dict.fromkeys(RANKS, 0)))


def test_the_heat_map_has_a_row_per_site_and_a_column_per_change() -> None:
    history = [(0, RANKS), (20, {**RANKS, "encoder.layer.2.attention.self.value": 0}), (40, RANKS)]
    figure = heat.ranks_over_time(history, 60)
    mesh = figure.axes[0].collections[0]
    assert mesh.get_array().shape == (6, 3)
    assert mesh.get_array()[5].tolist() == [3, 0, 3]
    assert figure.axes[0].get_xlim() == (0, 60)
    assert {"0   query", "2   query", "value"} <= set(texts(figure))


def test_the_heat_map_ends_soon_after_the_last_change_and_says_so() -> None:
    figure = heat.ranks_over_time([(0, RANKS), (10, {**RANKS, "encoder.layer.0.attention.self.query": 3})], 1000)
    assert figure.axes[0].get_xlim() == (0, 14)
    assert any("no change after step 10; the run ended at step 1000" in text for text in texts(figure))


def test_a_large_model_names_layers_only() -> None:
    many = {f"layers.{layer}.{name}": 4 for layer in range(40) for name in ("q", "k", "v", "o")}
    figure = heat.ranks_over_time([(0, many)], 10)
    assert len(figure.axes[0].get_yticks()) == 40
    style.svg(heat.rank_picture(many))


def test_the_grid_has_a_place_for_every_site_and_none_for_what_is_no_site() -> None:
    rows, layers, grid = heat.rank_grid({**RANKS, "pooler.dense": 7})
    assert rows == ["query", "value", "pooler"] and layers == [0, 1, 2, None]
    np.testing.assert_array_equal(grid[:2, :3], [[1, 2, 3], [1, 2, 3]])
    assert grid[2, 3] == 7 and np.isnan(grid[:2, 3]).all() and np.isnan(grid[2, :3]).all()


@pytest.mark.parametrize("changes", [1, 2, 3, 5, 6, 40])
def test_the_grids_over_time_begin_at_the_start_and_end_at_the_end(changes: int) -> None:
    site = "encoder.layer.1.attention.self.value"
    history = [(10 * place, {**RANKS, site: place}) for place in range(changes + 1)]
    figure = heat.ranks_in_steps(history)
    shown = [axes for axes in figure.axes if axes.get_visible() and axes.get_title().startswith("step")]
    steps = [int(axes.get_title().removeprefix("step ")) for axes in shown]
    assert steps[0] == 0 and steps[-1] == 10 * changes and steps == sorted(set(steps))
    assert len(shown) == min(heat.FRAMES, changes + 1)
    for step, axes in zip(steps, shown, strict=True):
        assert axes.collections[0].get_array()[1, 1] == step // 10
    assert len({axes.collections[0].norm.vmax for axes in shown}) == 1, "one scale of colours for all"


def test_a_site_that_is_gone_later_has_rank_0_in_the_grids_over_time() -> None:
    gone = {site: rank for site, rank in RANKS.items() if ".2." not in site}
    figure = heat.ranks_in_steps([(0, RANKS), (10, RANKS | {"encoder.layer.0.attention.self.query": 5}), (20, gone)])
    last = [axes for axes in figure.axes if axes.get_title() == "step 20"][0]
    assert last.collections[0].get_array()[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["y" * 900, "$x_{", "名前 🙂\x1b"])
def test_any_name_of_a_site_can_be_drawn(name: str) -> None:
    ranks = {**RANKS, f"encoder.layer.1.{name}": 3, name: 2}
    history = [(10 * step, {**ranks, name: step}) for step in range(3)]
    for figure in (heat.rank_picture(ranks), heat.ranks_over_time(history, 30), heat.ranks_in_steps(history)):
        assert "<svg" in style.svg(figure)
