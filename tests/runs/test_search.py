"""What is said of searches for ranks."""

from rankwise.runs.search import Search, in_words

FOUND = Search(17, 36, 2.314, "ω", "ranks")
IDLE = Search(0, 36, 0.31, "ω", "ranks", "raise every")


def test_one_search_in_words() -> None:
    assert str(FOUND) == "ranks changed at 17 of 36 sites, and ω moved by up to 2.31 ranks."
    assert str(IDLE) == (
        "ranks changed at 0 of 36 sites, and ω moved by up to 0.31 ranks: the result is that of plain LoRA; "
        "raise every."
    )
    assert str(Search(5, 9)) == "ranks changed at 5 of 9 sites."


def test_the_searches_of_several_seeds_in_one_sentence() -> None:
    assert in_words({0: FOUND, 1: IDLE, 7: IDLE}) == (
        "ranks changed at 17, 0, 0 of 36 sites (seeds 0, 1, 7), and ω moved by up to 2.31, 0.31, 0.31 ranks: "
        "the result is that of plain LoRA at seeds 1, 7; raise every."
    )
    assert in_words({3: IDLE, 4: IDLE}).count("plain LoRA;") == 1
    gates = Search(5, 9, 0.5, "gates")
    assert str(gates) == "ranks changed at 5 of 9 sites, and gates moved by up to 0.50."
