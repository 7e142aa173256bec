"""The texts are those of transformers' own search, and the model does less for them."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from models import TRANSLATORS, VOCABULARY, WRITERS, every_model, small_config
from rankwise.tasks import decoding
from rankwise.tasks.generation import padded

ENDS = list(range(4, 4 + VOCABULARY // 6))
"""So many that rows end at different steps, whatever the model."""
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17, 18, 19], [20], [21, 22, 23]]


def written(model, beams, ours, prompts=PROMPTS, longest=10, ends=ENDS, penalty=0.9, **options):
    """The tokens after each prompt up to the end, and of each forward pass how many rows and columns it had."""
    encodes = model.config.is_encoder_decoder
    ids, mask = padded(prompts, 3, left=not encodes)
    config = transformers.GenerationConfig(
        max_new_tokens=longest, num_beams=beams, do_sample=False, eos_token_id=ends, pad_token_id=3,
        length_penalty=penalty if beams > 1 else None,
        decoder_start_token_id=5 if encodes else None, **options,
    )  # fmt: skip
    model.generation_config = config
    shapes = []

    def note(_, args, kwargs):
        shapes.append(tuple(kwargs["decoder_input_ids" if encodes else "input_ids"].shape))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    more = {"custom_generate": decoding.search} if ours else {}
    with torch.inference_mode():
        outputs = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    handle.remove()
    rows = outputs[:, 1 if encodes else ids.shape[1] :].tolist()
    cut = [row[: next((i + 1 for i, id in enumerate(row) if id in ends), longest)] for row in rows]
    return cut, shapes


def small(kind="llama", seed=0):
    auto = transformers.AutoModelForSeq2SeqLM if kind in TRANSLATORS else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(small_config(kind)).double().eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("kinds", "auto"), [(WRITERS, "CausalLM"), (TRANSLATORS, "Seq2SeqLM")])
def test_every_family_writes_the_same(kinds, auto, beams, monkeypatch):
    usual, covered, other = decoding._usual, [], []
    monkeypatch.setattr(decoding, "_usual", lambda *args: covered.append(usual(*args)) or covered[-1])
    for kind, model in every_model(getattr(transformers, f"AutoModelFor{auto}"), kinds):
        model = model.double()
        try:
            theirs, _ = written(model, beams, ours=False)
        except Exception:  # it cannot write, or not in fp64
            continue
        ours, _ = written(model, beams, ours=True)
        if ours != theirs:
            other.append(kind)
    assert not other
    assert sum(covered) >= (60 if kinds is WRITERS else 8)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["llama", "gpt2", "t5"]),
    prompts=st.lists(st.lists(st.integers(4, 40), min_size=1, max_size=7), min_size=1, max_size=5),
    beams=st.integers(1, 5),
    longest=st.integers(1, 9),
    ends=st.lists(st.integers(4, 30), min_size=1, max_size=12, unique=True),
    penalty=st.sampled_from([-1.0, 0.0, 0.9, 2.0]),
    seed=st.integers(0, 3),
)
def test_any_prompts_beams_and_ends_give_the_same(kind, prompts, beams, longest, ends, penalty, seed):
    model = small(kind, seed)
    theirs, ours = (written(model, beams, which, prompts, longest, ends, penalty)[0] for which in (False, True))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_prompt_is_read_once_and_a_row_that_is_done_is_left_out(kind):
    model = small(kind)
    texts, ours = written(model, 3, ours=True, longest=20, penalty=0.0)
    same, theirs = written(model, 3, ours=False, longest=20, penalty=0.0)
    assert texts == same
    assert ours[0][0] == len(PROMPTS)
    assert theirs[0][0] == 3 * len(PROMPTS)
    rows = [count for count, _ in ours[1:]]
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < rows[0]
    assert len(ours) == len(theirs)
    assert {columns for _, columns in ours[1:]} == {1}
    greedy, shapes = written(model, 1, ours=True)
    lengths = [len(text) for text in greedy]
    assert len(set(lengths)) > 1
    assert [count for count, _ in shapes] == [sum(each > step for each in lengths) for step in range(max(lengths))]


def test_without_a_cache_or_with_another_one_transformers_searches_itself():
    model = small()
    for beams, options in (
        (1, {"use_cache": False}),
        (3, {"use_cache": False}),
        (1, {"cache_implementation": "static"}),
    ):
        texts, shapes = written(model, beams, ours=True, **options)
        assert texts == written(model, beams, ours=False)[0]
        assert {rows for rows, _ in shapes} == {beams * len(PROMPTS)}


def test_positions_on_several_axes_are_left_to_transformers():
    """As Qwen2-VL has them: (axes, rows, tokens), and there may be as many rows as axes."""
    model, ids = small(), torch.zeros(3, 4, dtype=torch.long)
    given = {"use_cache": True, "past_key_values": transformers.DynamicCache(config=model.config)}
    assert decoding._usual(model, ids, {**given, "position_ids": ids})
    assert not decoding._usual(model, ids, {**given, "position_ids": torch.zeros(3, 3, 4)})
    assert not decoding._usual(model, ids, {**given, "position_ids": ids[:2]})
