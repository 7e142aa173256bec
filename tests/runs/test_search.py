"""What is said of searches for ranks."""

from dataclasses import asdict

from rankwise.runs.search import Search, in_words

FOUND = Search(17, 36, 2.314, "max|ω − 1| · rank")
IDLE = Search(0, 36, 0.31, "max|ω − 1| · rank", "no rank can change below 0.5: raise every")


def test_one_search_in_words() -> None:
    assert str(FOUND) == "ranks changed at 17 of 36 sites, max|ω − 1| · rank = 2.31."
    assert str(IDLE) == (
        "ranks changed at 0 of 36 sites, max|ω − 1| · rank = 0.31: the result is plain LoRA's; "
        "no rank can change below 0.5: raise every."
    )
    assert str(Search(5, 9)) == "ranks changed at 5 of 9 sites."


def test_the_searches_of_several_seeds_in_one_sentence() -> None:
    text = in_words({0: FOUND, 1: IDLE, 7: IDLE})
    assert text.startswith(
        "ranks changed at 17, 0, 0 of 36 sites at seeds 0, 1, 7, max|ω − 1| · rank = 2.31, 0.31, 0.31"
    )
    assert ": the result is plain LoRA's at seeds 1, 7; " in text and text.count("raise every") == 1
    assert in_words({3: IDLE, 4: IDLE}).count("plain LoRA's;") == 1


def test_a_result_gives_back_what_it_keeps_and_nothing_where_it_keeps_none() -> None:
    assert Search.of({"search": asdict(IDLE)}) == IDLE
    assert Search.of({"search": {"changed": 5, "sites": 9, "of another version": 1}}) == Search(5, 9)
    assert Search.of({}) is Search.of({"search": None}) is None
