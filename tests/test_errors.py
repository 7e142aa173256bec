import pytest

from rankwise.errors import InputError, installing, nearest, need


def test_nearest_is_silent_where_nothing_is_near() -> None:
    assert nearest("lorra", ["lora", "head"]) == ' (did you mean "lora"?)'
    assert nearest("xyz", ["lora", "head"]) == ""


def test_need_names_the_extra_of_a_missing_package() -> None:
    assert need("json", "bench").dumps([]) == "[]"
    with pytest.raises(InputError, match=r"^surely_not_there is not installed: ") as refusal:
        need("surely_not_there.part", "bench")
    assert str(refusal.value).endswith(installing("bench"))
