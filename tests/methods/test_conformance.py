"""What every registered method promises. A new method is tested here the moment its file exists.

The promises themselves are checks of `rankwise.conformance`, which `rankwise check-method` runs on anyone's method.
"""

import json
import re

import pytest
from peft import PeftModel

import models
import rankwise as rw
import stock_peft
from methods import METHODS, TRAINS, attached, every_method, method, one_shape
from rankwise.conformance import CHECKS, Case, plugin
from rankwise.methods import Method
from rankwise.methods.peer import Peer


def optimizer(name, model, lr=1e-2):
    return rw.SimplexAdam(method(name), model, lr=lr)


@pytest.mark.parametrize(
    ("check", "shape", "name"),
    [
        pytest.param(
            *(check, shape, name),
            id=f"{check.__name__}-{shape}-{name}",
            # each method at one shape, and each shape in its turn
            marks=[pytest.mark.large] if "compiled" in check.__name__ or (turn - place) % len(shapes) else [],
        )
        for first, (check, shapes) in enumerate(CHECKS.items())
        for place, shape in enumerate(shapes)
        for turn, name in enumerate(METHODS, start=first)
    ],
)
def test_every_method_keeps_its_promise(name, check, shape, tmp_path):
    check(Case(method(name), tmp_path, shape))


def test_the_promises_are_these():
    assert {check.__name__: len(shapes) for check, shapes in CHECKS.items()} == {
        "attaching_changes_no_logit_unless_the_method_says_so": 5,
        "groups_are_disjoint_and_cover_all_that_trains": 5,
        "training_moves_what_trains_and_nothing_else": 5,
        "folding_changes_no_output": 5,
        "a_bare_loop_cut_at_any_step_goes_on_bit_identically": 1,
        "a_trainer_resumes_bit_identically": 1,
        "gradient_checkpointing_gives_the_same_losses": 5,
        "it_trains_under_bf16_autocast": 1,
        "compiled_it_trains_to_the_same_losses": 1,
        "saved_and_loaded_again_it_gives_the_same_logits": 5,
        "stock_peft_loads_what_is_saved": 1,
        "no_more_is_left_at_the_end_than_the_method_says": 1,
        "a_search_says_at_how_many_sites_ranks_have_changed": 1,
        "a_plan_that_is_refused_leaves_the_model_as_it_was": 1,
    }


@every_method
def test_what_trains_has_the_names_of_the_table_and_no_other(name):
    model = attached(name)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n in names if re.search(r"(^|\.)classifier\.(modules_to_save\.default\.)?(weight|bias)$", n)}
    assert head
    assert {n for n in names if re.search(TRAINS[name], n)} | head == names
    # The other way round: everything that looks like it trains, but for what a wrapper keeps of the head.
    looks = {n for n, _ in model.named_parameters() if re.search(TRAINS[name], n) and "original_module" not in n}
    assert looks <= names


@one_shape
def test_stock_peft_loads_every_method_that_is_an_adapter(shape, tmp_path):
    expected = {}
    for name in TRAINS:
        if shape == "t5" and isinstance(method(name), Peer):  # PEFT cannot merge these if a head has several layers
            continue
        model = attached(name, shape)
        models.train(model, optimizer(name, model), 3)
        expected[tmp_path / name] = models.logits(model)
        model = method(name).fold(model)
        if isinstance(model, PeftModel):
            rw.save(model, tmp_path / name)
        else:
            del expected[tmp_path / name]
    assert len(expected) >= 10
    stock_peft.agrees(models.model(shape), models.batch(), expected, tmp_path)


PLUGIN = """
from dataclasses import dataclass

from rankwise.methods.lora import LoRA


@dataclass(frozen=True)
class Wrong(LoRA, name="wrong"):
    \"\"\"LoRA that says of itself what is not so, and gives the optimizer half of it.\"\"\"

    @property
    def exact_start(self):
        return False

    def param_groups(self, model):
        return super().param_groups(model)[:1]
"""


def test_a_method_in_a_file_of_its_own_is_checked_as_ours_are(tmp_path, cli, monkeypatch):
    monkeypatch.setattr(Method, "known", dict(Method.known))  # the method is gone after the test
    few = {check: shapes for check, shapes in CHECKS.items() if "bit" in check.__name__ or "groups" in check.__name__}
    few |= {check: ("bert",) for check in CHECKS if "logit" in check.__name__ or "folding" in check.__name__}
    monkeypatch.setattr(plugin, "CHECKS", few)
    file = tmp_path / "wrong.py"
    file.write_text(PLUGIN)
    code, out, err = cli("check-method", file, "rank=2", "--json")
    assert code == 1, err
    found = json.loads(out)
    assert {each["method"] for each in found} == {"wrong"} and len(found) == sum(map(len, few.values()))
    broken = {each["check"]: each["broken"] for each in found if each["broken"]}
    assert (
        broken["attaching changes no logit unless the method says so"]
        == "exact_start is False, and equal logits are True"
    )
    assert broken["groups are disjoint and cover all that trains"] == "the groups do not hold exactly what trains"
    assert "folding changes no output" not in broken


def test_a_file_without_a_method_is_refused_in_one_line(tmp_path, cli):
    for name, text, message in (
        ("missing", None, "is no file"),
        ("empty", "x = 1", "holds no method"),
        ("broken", "1 / 0", "cannot be loaded: ZeroDivision"),
    ):
        file = tmp_path / f"{name}.py"
        if text:
            file.write_text(text)
        code, out, err = cli("check-method", file)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1
