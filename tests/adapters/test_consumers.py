from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rankwise.adapters.consumers import CONSUMERS, VLLM_RANKS, max_lora_rank, not_served, portable_rank

ROOT = Path(__file__).parent.parent.parent


def test_the_table_in_the_docs_says_what_the_code_knows():
    page = (ROOT / "docs" / "adapters.md").read_text().replace("**", "")
    rows = [line for line in page.split("| consumer |")[1].splitlines() if line.startswith("| ")]
    expected = [f"| {c.name} | {c.patterns} | {c.compact} | {c.gaps} | {c.portable} | {c.why} |" for c in CONSUMERS]
    assert rows[: len(expected)] == expected


def test_those_who_are_silently_wrong_come_first():
    first = [c.name for c in not_served("compact")][:3]
    assert first == ["PEFT's hotswap_adapter up to 0.21", "vLLM up to 0.31", "TGI and LoRAX"]
    assert "vLLM up to 0.31" not in {c.name for c in not_served("portable")}
    for layout in ("patterns", "compact", "gaps", "portable"):
        readings = [c.reads(layout) for c in not_served(layout)]
        assert readings == sorted(readings, reverse=True)  # wrong, refused
        assert "right" not in readings


@given(st.integers(1, 600))
def test_a_portable_rank_holds_every_layer_and_is_not_padded_again(rank):
    padded = portable_rank(rank)
    assert rank <= padded < rank + 16
    assert padded == 8 or padded % 16 == 0
    assert portable_rank(padded) == padded


@given(st.integers(1, 600))
def test_the_rank_that_vllm_is_given_is_the_smallest_that_is_enough(rank):
    assert max_lora_rank(rank) == min((r for r in VLLM_RANKS if r >= rank), default=None)
