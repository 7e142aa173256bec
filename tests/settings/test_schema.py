from pathlib import Path
from typing import Any

import jsonschema

from rankwise import methods, tasks
from rankwise.settings import RunConfig, Schema, json_schema, read_yaml
from rankwise.settings.run import LARGEST
from rankwise.sweep import runners
from small_schema import SCHEMA, Adapter


def test_the_json_schema_knows_methods_options_and_tasks() -> None:
    schema = json_schema(SCHEMA)
    names, *tasks = schema["properties"]["task"]["oneOf"]
    assert names == {"enum": ["cola", "mrpc"]}
    assert tasks[1]["properties"]["protocol"]["default"] == "official"
    lora = next(
        entry
        for entry in schema["properties"]["method"]["oneOf"]
        if entry.get("properties", {}).get("name") == {"const": "lora"}
    )
    assert lora["properties"]["rank"] == {"type": "integer", "default": 8, "minimum": -LARGEST, "maximum": LARGEST}
    assert lora["description"] == "A method with options of every kind."
    assert lora["additionalProperties"] is False
    assert {"vary", "report", "learning_rate"} <= schema["properties"].keys()
    assert all(
        "description" in schema["properties"][key] for key in RunConfig.model_fields if key not in ("method", "task")
    )


EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
OWN = {"task": {"type": "pair", "dataset": "d", "columns": {"text": "a", "text_pair": "b", "label": "c"}}, "epochs": 1}


def test_editors_accept_by_the_schema_what_rankwise_accepts() -> None:
    check = jsonschema.Draft202012Validator(json_schema(Schema(methods.registry(), tasks.registry()))).is_valid
    for file in EXPERIMENTS:
        assert check(read_yaml(file)), file.name
    assert check(OWN) and check({"task": "mrpc", "method": {"name": "sora", "rank": 4}})
    assert check({"task": {"name": "e2e", "beams": 4}})
    assert not check({**OWN, "epoch": 1})
    assert not check({"task": {**OWN["task"], "column": {}}})
    assert not check({"task": {**OWN["task"], "name": "pair"}})
    assert not check({"task": {"dataset": "d"}})
    assert not check({"task": "mrpc", "method": {"name": "sora", "rate": 4}})


def test_the_schema_asks_for_no_option_that_has_a_default() -> None:
    schema = json_schema(Schema({"lora": Adapter}, tasks.registry()))
    pair = next(
        each
        for each in schema["properties"]["task"]["oneOf"]
        if each.get("properties", {}).get("name", {}).get("const") == "pair"
    )
    assert pair["required"] == [] and pair["properties"]["columns"]["default"] == {}


def test_no_number_is_without_bounds() -> None:
    """So that what is computed from it is finite, and an editor knows."""

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if node.get("type") in ("integer", "number"):
                assert {"minimum", "exclusiveMinimum"} & node.keys(), path
                assert {"maximum", "exclusiveMaximum"} & node.keys(), path
            for key, each in node.items():
                walk(each, f"{path}.{key}")
        elif isinstance(node, list):
            for each in node:
                walk(each, path)

    walk(json_schema(Schema(methods.registry(), tasks.registry())), "")
    walk(json_schema(Schema(runners.registry(), {})), "")


def test_an_editor_knows_the_range_of_an_option() -> None:
    """Also where a subclass only has another default."""
    ranges = {}
    for method in json_schema(Schema(methods.registry(), {}))["properties"]["method"]["oneOf"][1:]:
        options = method["properties"]
        ranges[options["name"]["const"]] = options
    assert ranges["lora"]["rank"]["minimum"] == ranges["fat-lora"]["times"]["minimum"] == 1
    assert ranges["lora"]["alpha"]["exclusiveMinimum"] == 0
    assert (ranges["dora"]["dropout"]["minimum"], ranges["dora"]["dropout"]["exclusiveMaximum"]) == (0, 1)
    assert ranges["fat-lora"]["omega_rate"]["anyOf"][0]["minimum"] == 0
