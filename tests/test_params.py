"""Every count that the papers' tables rest on, from definitions alone; labels stand beside and never move a count."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from rankwise import published
from rankwise.archs import archs, find
from rankwise.errors import InputError
from rankwise.methods import build, registry
from rankwise.settings import Schema, load_method
from rankwise.train.params import Count, count

QKV = ["query_proj", "key_proj", "value_proj"]
SIX = [*QKV, "attention.output.dense", "intermediate.dense", "output.dense"]
FOUR = ["query", "key", "value", "attention.output.dense"]
QV = ["c_attn.q", "c_attn.v"]
CLASSIFIER = 592_130  # of roberta-base: 768² + 768 + 2 · 768 + 2

COUNTS: list[tuple[str, str, dict[str, Any], list[str], int, int | None]] = [
    # arch, method, options, head, trainable at the start, final
    ("deberta-v3-base", "lora", {"rank": 8, "targets": QKV}, [], 442_368, 442_368),
    ("deberta-v3-base", "simplex-lora", {"rank": 8, "targets": QKV}, [], 442_368 + 36, 442_368),
    ("deberta-v3-base", "weight-lora", {"rank": 8, "keep": 10, "targets": QKV}, [], 442_368 + 36, 122_916),
    ("deberta-v3-base", "random-lora", {"rank": 8, "keep": 10, "targets": QKV}, [], 122_880, 122_880),
    ("deberta-v3-base", "fat-lora", {"rank": 8, "targets": QKV}, [], 442_368 + 36, None),
    ("deberta-v3-base", "lora", {"rank": 8, "targets": SIX}, [], 1_327_104, 1_327_104),
    ("deberta-v3-base", "sora", {"rank": 8, "targets": SIX}, [], 1_327_104 + 576, 1_327_104),
    ("deberta-v3-base", "dora", {"rank": 8, "targets": QKV}, [], 442_368 + 36 * 768, 442_368 + 36 * 768),
    ("deberta-v3-base", "pissa", {"rank": 8, "targets": QKV}, [], 442_368, 442_368),
    ("deberta-v3-base", "full", {}, [], 183_831_552, 183_831_552),
    ("deberta-v3-base", "full", {}, ["classifier"], 183_831_552 + 1_538, 183_831_552 + 1_538),
    ("deberta-v3-base", "full", {}, ["classifier", "pooler"], 184_423_682, 184_423_682),
    ("deberta-v3-base", "head", {}, ["classifier"], 1_538, 1_538),
    ("deberta-v3-base", "lora", {"rank": 8, "targets": QKV}, ["classifier"], 442_368 + 1_538, 442_368 + 1_538),
    *[
        ("roberta-base", "lora-fa", {"rank": r, "targets": FOUR}, ["classifier"], *[36_864 * r + CLASSIFIER] * 2)
        for r in (8, 4, 2, 1)
    ],
    ("roberta-base", "lora-fa", {"rank": 8, "targets": FOUR}, [], 36_864 * 8, 36_864 * 8),
    ("roberta-base", "bitfit", {}, [], 102_912 - 768, 102_912 - 768),  # deberta-v3 has one norm more
    ("t5-small", "sora", {"rank": 8, "targets": "all-linear+lm_head"}, [], 1_343_240, 1_343_240 - 97 * 8),
    ("t5-small", "sora", {"rank": 16, "targets": "all-linear+lm_head"}, [], 2_686_480, 2_686_480 - 97 * 16),
    ("t5-small", "sora", {"rank": 8, "targets": "all-linear"}, [], 1_082_112, 1_082_112 - 96 * 8),
    ("t5-small", "sora", {"rank": 16, "targets": "all-linear"}, [], 2_164_224, 2_164_224 - 96 * 16),
    ("gpt2-medium", "full", {}, [], 354_823_168, 354_823_168),
    ("gpt2-large", "full", {}, [], 774_030_080, 774_030_080),
    ("gpt2-medium", "full-top", {"blocks": 2}, [], 25_192_448, 25_192_448),
    ("gpt2-medium", "lora", {"rank": 4, "targets": QV}, [], 393_216, 393_216),
    ("gpt2-large", "lora", {"rank": 4, "targets": QV}, [], 737_280, 737_280),
    ("gpt2-medium", "adapter-l", {"size": 6}, [], 368_784, 368_784),
    ("gpt2-medium", "adapter-l", {"size": 224}, [], 11_089_152, 11_089_152),
    ("gpt2-large", "adapter-l", {"size": 8}, [], 875_808, 875_808),
    ("gpt2-large", "adapter-l", {"size": 248}, [], 23_002_848, 23_002_848),
    ("gpt2-medium", "adapter-h", {"size": 112}, [], 11_064_576, 11_064_576),
    ("gpt3-175b", "adapter-h", {"size": 1}, [], 7_078_080, 7_078_080),
    ("gpt3-175b", "adapter-h", {"size": 8}, [], 40_109_568, 40_109_568),
    ("gpt3-175b", "pre-embed", {"prefix": 256, "infix": 8}, [], 3_244_032, 3_244_032),
    ("gpt3-175b", "pre-layer", {"prefix": 8, "infix": 8}, [], 18_874_368, 18_874_368),
    ("gpt3-175b", "lora", {"rank": 1, "targets": QV}, [], 4_718_592, 4_718_592),
    ("gpt3-175b", "lora", {"rank": 8, "targets": QV}, [], 37_748_736, 37_748_736),
    ("gpt3-175b", "bitfit", {}, [], 12_988_416, 12_988_416),
    ("gpt3-175b", "full", {}, [], 174_604_259_328, 174_604_259_328),
    ("llama-3.1-8b", "lora", {"rank": 8, "targets": ["q_proj", "v_proj"]}, [], 3_407_872, 3_407_872),
    ("minilm-l6", "lora", {"rank": 8, "targets": ["query", "key", "value"]}, [], 110_592, 110_592),
]

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(cli: Cli) -> Cli:
    """Call `rankwise params`."""
    return partial(cli, "params")


def counted(arch: str, method: str, head: list[str] | None = None, **options: Any) -> Count:
    return count(find(arch), build({"name": method, **options}), head or [])


def _name(case: Any) -> str | None:
    return (
        ",".join(f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in case.items())
        if isinstance(case, dict)
        else None
    )


@pytest.mark.parametrize(("arch", "method", "options", "head", "trainable", "final"), COUNTS, ids=_name)
def test_counts_are_exact(
    arch: str, method: str, options: dict[str, Any], head: list[str], trainable: int, final: int | None
) -> None:
    found = counted(arch, method, head, **options)
    assert (found.trainable, found.final) == (trainable, final)
    assert sum(row["parameters"] for row in (*found.per_site, *found.other)) == trainable


@pytest.mark.parametrize(
    "arch",
    [
        "minilm-l6",
        *(
            pytest.param(arch, marks=pytest.mark.large)
            for arch in ("gpt2-medium", "deberta-v3-base", "llama-3.1-8b", "t5-small")
        ),
    ],
)
@pytest.mark.parametrize("method", sorted(registry()))
def test_every_method_can_be_counted_and_its_parts_add_up(method: str, arch: str) -> None:
    head = ["classifier"] if find(arch).built_as.endswith("SequenceClassification") else []
    if method == "head" and not head:
        with pytest.raises(InputError, match="name its modules"):
            counted(arch, method)
        return
    if method == "none":
        if head:
            with pytest.raises(InputError, match="use the method head"):
                counted(arch, method, head)
        else:
            assert counted(arch, method).trainable == 0
        return
    found = counted(arch, method, head)
    assert 0 < found.trainable <= found.total
    assert found.final is None or 0 < found.final <= found.trainable
    assert found.head == (sum(p.numel() for p in _classifier(arch)) if head else 0)
    assert sum(row["parameters"] for row in (*found.per_site, *found.other)) == found.trainable
    names = [row["name"] for row in (*found.per_site, *found.other)]
    assert len(set(names)) == len(names)
    assert not any("base_model" in name or "lora_A" in name or "modules_to_save" in name for name in names)


def _classifier(arch: str) -> Any:
    import torch

    from rankwise.train.params import build as model

    with torch.device("meta"):
        return list(model(find(arch)).get_submodule("classifier").parameters())


def test_sites_and_what_trains_beside_them_are_told_apart() -> None:
    found = counted("deberta-v3-base", "simplex-lora", ["classifier"], rank=8, targets=QKV)
    assert len(found.per_site) == 36
    assert found.per_site[0] == {
        "name": "deberta.encoder.layer.0.attention.self.query_proj",
        "rank": 8,
        "parameters": 12_288,
    }
    assert sorted(row["name"] for row in found.other) == ["classifier", "lora_omega"]
    assert (found.head, found.total) == (1_538, 184_423_682 + 442_368 + 36)
    assert found.percent == 100 * (442_368 + 36 + 1_538) / found.total


def test_gates_count_with_their_site_and_frozen_factors_only_in_the_total() -> None:
    plain, gated = (counted("deberta-v3-base", name, rank=8, targets=SIX) for name in ("lora", "sora"))
    assert [row["parameters"] + 8 for row in plain.per_site] == [row["parameters"] for row in gated.per_site]
    assert gated.total == plain.total + 576
    fixed = counted("deberta-v3-base", "lora-fa", rank=8, targets=SIX)
    assert fixed.total == plain.total
    assert fixed.trainable < plain.trainable


def test_a_site_that_was_not_chosen_is_listed_with_rank_0() -> None:
    found = counted("deberta-v3-base", "random-lora", rank=8, keep=10, targets=QKV)
    assert sorted(row["rank"] for row in found.per_site) == [0] * 26 + [8] * 10


def test_without_sites_the_modules_that_train_are_listed() -> None:
    found = counted("gpt2-medium", "full-top", blocks=2)
    assert found.other == []
    assert {"name": "transformer.h.23.mlp.c_fc", "rank": None, "parameters": 4 * 1024**2 + 4096} in found.per_site


def test_the_head_of_a_classifier_is_left_out_of_the_count_unless_named() -> None:
    biases = [counted("deberta-v3-base", "bitfit", head) for head in ([], ["classifier"], ["classifier", "pooler"])]
    assert [each.trainable - biases[0].trainable for each in biases] == [0, 1_538, 1_538 + 590_592]
    assert len({each.total for each in biases}) == 1


# --- published labels ------------------------------------------------------------------------------------------------

DIFFERENT = {
    ("gpt2-medium", "lora", "0.35M"): 393_216,
    ("gpt2-large", "lora", "0.77M"): 737_280,
    ("gpt2-medium", "full", "354.92M"): 354_823_168,
    ("gpt3-175b", "full", "175255.8M"): 174_604_259_328,
    ("gpt3-175b", "bitfit", "14.2M"): 12_988_416,
    ("gpt3-175b", "pre-layer", "20.2M"): 18_874_368,
    ("deberta-v3-base", "sora", "0.91M"): 1_327_680,
}
"""Labels that our definitions do not give when rounded. They stay as printed."""


@pytest.mark.parametrize(
    ("arch", "method", "options", "label"),
    [pytest.param(*row, id=f"{row[0]}-{row[1]}-{row[3].label}") for row in published.counts()],
)
def test_a_label_is_what_its_count_rounds_to_or_is_known_to_differ(
    arch: str, method: str, options: dict[str, Any], label: published.Label
) -> None:
    full, head = load_method(method, [f"{k}={json.dumps(v)}" for k, v in options.items()], Schema(registry(), {}))
    assert head == []
    found = count(find(arch), build(full), [])
    assert label in published.labels(arch, method, full)
    printed, _, percent = label.label.partition(" ")
    number = printed.removesuffix("M")
    digits = len(number.partition(".")[2])
    assert found.final is not None
    sizes = {found.trainable, found.final}
    fits = {f"{size / 1e6:.{digits}f}M" if printed.endswith("M") else str(size) for size in sizes}
    different = DIFFERENT.get((arch, method, printed))
    assert (printed in fits) == (different is None)
    assert different is None or found.trainable == different
    if percent:
        assert percent.strip("(%)") in {f"{100 * size / found.total:.2f}" for size in sizes}


def test_a_label_belongs_to_its_options_and_to_no_others() -> None:
    def labels(**options: Any) -> list[str]:
        return [each.label for each in published.labels("deberta-v3-base", "lora", options)]

    assert labels(rank=8, targets=QKV, alpha=16.0) == labels(rank=8, targets=QKV[::-1]) == ["442368 (0.24%)"]
    assert labels(rank=8, targets=SIX) == ["1.33M"]
    assert labels(rank=4, targets=QKV) == labels(rank=8, targets=QKV[:2]) == labels(targets=QKV) == []
    assert published.labels("roberta-base", "lora", {"rank": 8, "targets": QKV}) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_with_the_label_beside(cli: Cli) -> None:
    code, out, err = cli("--arch", "gpt3-175b", "--method", "pre-embed", "prefix=256", "infix=8")
    assert (code, err) == (0, "")
    assert dict(line.split(maxsplit=1) for line in out.splitlines()) == {
        "arch": "gpt3-175b (Brown et al. 2020, arXiv 2005.14165, table 2.1; as a GPT-2), built as GPT2LMHeadModel",
        "method": "pre-embed prefix=256 infix=8",
        "trainable": "3,244,032",
        "head": "not counted",
        "final": "3,244,032",
        "total": "174,607,503,360",
        "percent": "0.001858",
        "published": "3.2M: Hu et al. 2021, LoRA, arXiv 2106.09685, table 4, GPT-3 PreEmbed",
    }


def test_the_command_says_which_part_is_the_head_and_what_stays(cli: Cli) -> None:
    options = ("rank=8", "keep=10", "targets=[query_proj,key_proj,value_proj]", "head=[classifier]")
    code, out, err = cli("--arch", "deberta-v3-base", "--method", "weight-lora", *options)
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert lines["trainable"] == "443,942" and lines["final"] == "124,454 at most"
    assert lines["head"] == "1,538 of these, in classifier"
    assert lines["method"].startswith("weight-lora rank=8 alpha=16 targets=[query_proj,key_proj,value_proj] ")
    assert lines["published"].startswith("122916 (0.07%): Simplex LoRA, slides")
    assert "final      depends on what is learnt\n" in cli("--arch", "minilm-l6", "--method", "fat-lora")[1]


def test_the_command_prints_json(cli: Cli) -> None:
    code, out, err = cli("--arch", "t5-small", "--method", "lora", "targets=[q,v]", "rank=4", "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert list(found) == ["trainable", "final", "total", "percent", "head", "per_site", "other", "published"]
    assert found["trainable"] == found["final"] == 36 * 4 * 1024
    assert found["total"] == 60_506_624 + found["trainable"]
    assert found["percent"] == pytest.approx(100 * found["trainable"] / found["total"])
    assert [row["rank"] for row in found["per_site"]] == [4] * 36
    assert (found["head"], found["other"], found["published"]) == (0, [], [])
    label = json.loads(cli("--arch", "gpt2-large", "--method", "full", "--json")[1])["published"]
    assert [(each["label"], each["table"]) for each in label] == [("774.03M", "3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "gpt2-medum", "--method", "lora"], 'no such arch (did you mean "gpt2-medium"?)'),
        (["--arch", "minilm-l6", "--method", "lorra"], 'no such method (did you mean "lora"?)'),
        (["--arch", "minilm-l6", "--method", "lora", "rnak=8"], 'lora has no such option (did you mean "rank"?)'),
        (["--arch", "minilm-l6", "--method", "lora", "rank=8.5"], "method.rank = 8.5: expected integer"),
        (["--arch", "minilm-l6", "--method", "lora", "rank=0"], "rank must be at least 1, not 0"),
        (["--arch", "minilm-l6", "--method", "lora", "rank=999"], "rank 999 is too large for bert.encoder.layer.0"),
        (["--arch", "minilm-l6", "--method", "lora", "rank"], "'rank': expected key=value"),
        (["--arch", "minilm-l6", "--method", "lora", "name=sora"], "name: is no option"),
        (["--arch", "minilm-l6", "--method", "lora", "targets=[qery]"], 'or convolution (did you mean "query"?)'),
        (["--arch", "minilm-l6", "--method", "lora", "head=[clasifier]"], '(did you mean "classifier"?)'),
        (["--arch", "minilm-l6", "--method", "lora", "head=3"], "head = 3: expected names of modules"),
        (["--arch", "gpt2-medium", "--method", "head"], "name its modules"),
        (["--method", "lora"], "Missing option '--arch'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_exits_with_2(arguments: list[str], message: str, cli: Cli) -> None:
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("rankwise: ") and err.count("\n") == 1
    assert message in err


def test_an_option_may_be_written_as_in_a_configuration() -> None:
    options, head = load_method("lora", ["method.rank=3", "head=classifier"], Schema(registry(), {}))
    assert (options["name"], options["rank"], options["targets"], head) == ("lora", 3, "all-linear", ["classifier"])


@pytest.mark.large
def test_the_largest_model_takes_under_2_gigabytes() -> None:
    """All of the process counts: torch, transformers and peft among it. 175 billion weights would be 349 GB."""
    script = (
        "import resource, sys\n"
        "from rankwise.cli import main\n"
        "for method in ('lora', 'full', 'sora', 'pre-layer'):\n"
        "    sys.argv = ['rankwise', 'params', '--arch', 'gpt3-175b', '--method', method, '--json']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "    print('\\f', flush=True)\n"
        "    print( resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    )
    # By way of a shell, which is small: a child's peak starts at the size of the process that launched it.
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1"; exit $?', sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    counts = [json.loads(each) for each in done.stdout.split("\f")[:-1]]
    assert len(counts) == 4 and all(each["total"] >= 174_604_259_328 for each in counts)
    peaks = [int(line) for line in done.stderr.splitlines()]  # of all until then
    assert len(peaks) == 4 and peaks[-1] < 2e9


def test_every_arch_can_be_counted() -> None:
    assert all(counted(name, "lora", rank=1).trainable > 0 for name in archs())
