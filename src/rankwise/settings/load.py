"""From a file, a mapping and `key=value` to checked settings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rankwise.errors import InputError, nearest
from rankwise.named import load_plugin, options_of, written
from rankwise.settings.experiment import OWN, Experiment, Published, Tune
from rankwise.settings.run import (
    DECODER,
    NAMED,
    PLACE,
    SCALED,
    SECTIONS,
    WRITTEN,
    RunConfig,
    explain,
    named,
    put,
    run_config,
    with_nested,
)
from rankwise.settings.schema import Schema, check_options
from rankwise.settings.yaml_files import parse_yaml, plain_data, quoted, read_yaml

# Settings of a run that a section of an experiment makes, each with what to write in their place.
_BY_SECTION = {
    "tuning": "tune chooses learning rates, and tune.share or tune.rows says by what",
    "tuned": "tune chooses learning rates, and notes that it did",
    "after": "the stages of `chain:` follow one another by themselves",
    "followed": "the stages of `chain:` follow one another by themselves",
}
_NOTHING = Schema({}, {})


def load(
    source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str] = (), schema: Schema = _NOTHING
) -> RunConfig | Experiment:
    """The configuration in `source` (a YAML file, or a mapping) with `key=value` overrides applied, fully checked.

    A file with `vary:` is an Experiment, any other a RunConfig. Method options come back complete, defaults filled in.
    In an experiment an override of a varied key replaces that axis (`seed=0`, `seed=[0,1]`), `method=NAME` keeps the
    varied methods of that name, and `method.OPTION=value` reaches every varied method that has the option.
    At `scale: smoke` or `small` what is in the file's section of that name comes first, as if given in the same way.
    Raises InputError for everything that is wrong with the file or the values.
    """
    name, where = "experiment", ""
    if source is None:
        data: dict[str, Any] = {}
    elif isinstance(source, Mapping):
        data = _mapping(source)
    else:
        name, where = Path(source).stem, f"{source}: "
        data = read_yaml(Path(source))
    if made := {"id", "made_with"} <= data.keys():
        data = {key: value for key, value in data.items() if key not in WRITTEN}
    settings = [override(text) for text in overrides]
    try:
        if isinstance(published := data.get("published"), dict):
            data["published"] = {"changed": _changed(settings), **published}
        groups = [[] if made else _at_scale(data, settings), settings]
        plugins = [value for group in (data.items(), *groups) for key, value in group if key == "plugins"]
        if plugins:
            data["plugins"] = _plugins(plugins[-1])
        groups = [[(key, value) for key, value in group if key != "plugins"] for group in groups]
        if "vary" in data or any(key.startswith("vary.") for group in groups for key, _ in group):
            return _experiment(data, groups, schema, name)
        for key, value in itertools.chain(*groups):
            put(data, key, value)
        return complete(run_config(data), schema)
    except InputError as error:
        raise InputError(f"{where}{error}") from None


def load_method(name: str, overrides: Sequence[str], schema: Schema) -> tuple[dict[str, Any], list[str]]:
    """The method `name` with its `key=value` options checked and all defaults filled in, and what `head=[…]` names.

    It may be a method of a file that `plugins=[…]` names.

    Raises InputError for an unknown method or option, and for a value out of range.
    """
    options = _nested(overrides)
    if "name" in options:
        raise InputError("name: is no option; the method is named once")
    if "plugins" in options:
        _plugins(options.pop("plugins"))
    head = options.pop("head", [])
    head = [head] if isinstance(head, str) else head
    if not isinstance(head, list) or not all(isinstance(part, str) for part in head):
        raise InputError(f"head = {quoted(head)}: expected names of modules, as in head=[classifier]")
    if isinstance(below := options.get("method"), dict):  # typed as in a configuration, `method.rank=4`
        options = {**{key: value for key, value in options.items() if key != "method"}, **below}
    return check_options("method", schema.methods, {**options, "name": name}), head


def load_task(given: Any, schema: Schema) -> dict[str, Any]:
    """What a file has at `task:`, a name or a mapping, checked and with all defaults filled in."""
    return check_options("task", schema.tasks, named("task", _mapping({"task": given})["task"]))


def load_options(key: str, name: str, overrides: Sequence[str], known: Mapping[str, type]) -> dict[str, Any]:
    """The `key=value` options of `known[name]`, checked and with all defaults filled in; `key` is for the messages.

    Raises InputError for an unknown name or option, and for a value out of range.
    """
    options = _nested(overrides)
    if "name" in options:
        raise InputError(f"name: is no option; the {key} is named once")
    checked = check_options(key, known, {**options, "name": name})
    return {option: value for option, value in checked.items() if option != "name"}


def _nested(overrides: Sequence[str]) -> dict[str, Any]:
    """Options as they were typed, dotted keys as mappings."""
    options: dict[str, Any] = {}
    for text in overrides:
        options = with_nested(options, *override(text))
    return options


def override(text: str) -> tuple[str, Any]:
    """Key and value of `key=value`, as it was typed. InputError for anything else."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f"{quoted(text)}: expected key=value, as in learning_rate=1e-3")
    plain_data({key: None})
    try:
        return key, parse_yaml(value)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _mapping(source: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of settings given in Python; paths become text, methods and tasks mappings of name and options."""
    try:
        data: dict[str, Any] = json.loads(json.dumps(dict(source), default=written))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"settings that cannot be written as YAML: {error}") from None
    return plain_data(data)


def _at_scale(data: dict[str, Any], settings: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What the section of the scale that is asked for sets; `smoke:` and `small:` are taken out of `data`."""
    sections = {name: data.pop(name, None) for name in SCALED}
    for name, given in sections.items():
        if given is not None and not isinstance(given, dict):
            raise InputError(f"{name} = {quoted(given)}: expected settings, as in `{name}: {SCALED[name]}`")
    scale = dict(settings).get("scale", data.get("scale"))
    if scale == "small" and sections["small"] is None:
        raise InputError(f"scale = small: there is no section `small`; add one, as in `small: {SCALED['small']}`")
    return [
        (str(key), value) for name, given in sections.items() if name == scale for key, value in (given or {}).items()
    ]


def _plugins(value: Any) -> list[str]:
    """Load the plugins that are listed at `plugins`, and return their absolute paths."""
    if not isinstance(value, list) or not all(isinstance(file, str) for file in value):
        raise InputError(f"plugins = {quoted(value)}: expected a list of Python files, as in `plugins: [my.py]`")
    try:
        return [str(load_plugin(file)) for file in value]
    except InputError as error:
        raise InputError(f"plugins: {error}") from None


def complete(config: RunConfig, schema: Schema) -> RunConfig:
    """`config` with its task and method checked, their defaults filled in, and the model of a task that generates."""
    task = check_options("task", schema.tasks, config.task)
    method = check_options("method", schema.methods, config.method, config.budget is not None)
    generates = getattr(schema.tasks[task["name"]], "family", "") == "generation"
    model = config.model or (DECODER if generates else None)
    return config.model_copy(update={"task": task, "method": method, "model": model})


def _experiment(
    data: dict[str, Any], groups: Sequence[Sequence[tuple[str, Any]]], schema: Schema, name: str
) -> Experiment:
    """The experiment of a file's `data`, changed by each group of settings in turn."""
    data, keys, tuned = dict(data), [*RunConfig.model_fields], data.get("tune") is not None
    for group in filter(None, groups):
        for key, value in group:
            if key.partition(".")[0] in SECTIONS:
                put(data, key, value)
        vary = _axes(data.get("vary"), keys)
        data["vary"] = vary
        for key, value in group:
            if key.partition(".")[0] not in SECTIONS:
                _override_experiment(data, vary, key, value, schema)
    settings = [*itertools.chain(*groups)]
    vary = _axes(data.pop("vary", None), keys)  # of which an override may have left no values
    report = data.pop("report", None) or {}
    published = _published(data.pop("published", None))
    chain = _chain(data.pop("chain", None), keys)
    for key, _ in settings:
        if any(key in stage or key.partition(".")[0] in stage for stage in chain):
            raise InputError(f"{key}: the stages of the chain set it; change the file, or give chain=[…]")
    for key, instead in _BY_SECTION.items():
        if any(key in part for part in (data, vary, *chain)):
            raise InputError(f"{key}: no setting of an experiment; {instead}")
    tune = _tune(data.pop("tune", None), {**data, **vary}, chain)
    if tuned and tune is None and not _rated(data, vary):
        raise InputError("tune = null: give a rate instead, learning_rate=1e-3 or vary.learning_rate=[1e-4, 1e-3]")
    runs = data.pop("runs", None) or f"runs/{name}"
    for key in data:
        if key not in RunConfig.model_fields:
            raise InputError(f"{key}: there is no such key{nearest(key, [*keys, *SECTIONS])}")
    report = _report(report, schema) if isinstance(report, dict) else report
    fitted = (vary.get("budget") or [data.get("budget")]) != [None]
    for key, known in (("method", schema.methods), ("task", schema.tasks)):
        if key in vary:
            vary[key] = [_filled(key, entry, known, vary, fitted) for entry in vary[key]]
        elif f"{key}.name" not in vary and (key == "method" or key in data):
            data[key] = _filled(key, named(key, data.get(key, {"name": "lora"})), known, vary, fitted)
        for stage in chain:
            if key in stage:
                stage[key] = _filled(key, named(key, stage[key]), known, {}, fitted)
    try:
        experiment = Experiment(
            name=name, base=data, vary=vary, chain=chain, tune=tune, report=report, published=published, runs=runs
        )
    except ValidationError as error:
        raise InputError(explain(error)) from None
    # Each combination is checked here, so that a sweep cannot stumble over its last run hours later.
    before: RunConfig | None = None
    for config in experiment.configs:
        complete(config, schema)
        if before is not None and config.after is not None:
            _check_link(before, config, schema)
        before = config
    return experiment


def _axes(vary: Any, keys: Sequence[str]) -> dict[str, list[Any]]:
    """What stands at `vary:`, checked, with methods and tasks spelled out."""
    if not isinstance(vary, dict) or not vary:
        raise InputError("vary: expected axes, as in `vary: {seed: [0, 1, 2]}`")
    for axis, values in vary.items():
        if str(axis).partition(".")[0] not in keys or axis in PLACE:
            raise InputError(f"vary.{axis}: there is no such key{nearest(axis, keys)}")
        if not isinstance(values, list) or not values:
            raise InputError(f"vary.{axis} = {quoted(values)}: expected a list of values, as in `{axis}: [..]`")
    vary = {axis: [named(axis, each) for each in values] if axis in NAMED else values for axis, values in vary.items()}
    for entry in vary.get("method", []):
        if entry.get("learning_rate") == []:
            raise InputError(f"vary.method: {entry.get('name')} has an empty list of learning rates")
    return vary


def _rated(data: Mapping[str, Any], vary: Mapping[str, Any]) -> bool:
    """Whether every run is given a learning rate, be it by its method."""
    methods = vary.get("method", [])
    return "learning_rate" in {**data, **vary} or bool(methods and all("learning_rate" in each for each in methods))


def _tune(given: Any, others: Mapping[str, Any], chain: Sequence[Any]) -> Tune | None:
    """What stands at `tune:`, checked; None where it is absent. `others` are the other settings and axes."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InputError(f"tune = {quoted(given)}: expected settings, as in `tune: {{learning_rate: [1e-4, 1e-3]}}`")
    for key in given:
        if key not in Tune.model_fields:
            raise InputError(f"tune.{key}: there is no such key{nearest(key, Tune.model_fields)}")
    if chain:
        raise InputError("tune: the rates of a chain cannot be tuned; give every stage its learning_rate")
    if "learning_rate" in others:
        raise InputError("learning_rate: tune chooses it; give rates to choose from as tune.learning_rate=[..]")
    for key in ("trials", "seeds"):  # None is a value of the first, and no list the other
        if key in given and given[key] is None:
            raise InputError(f"tune.{key}: is empty; leave it out or give a value")
    try:
        tune = Tune.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise InputError(explain(error, f"tune.{error.errors()[0]['loc'][0]}")) from None
    if len(set(tune.seeds)) < len(tune.seeds):
        raise InputError(f"tune.seeds = {tune.seeds}: expected different numbers")
    if tune.rows is not None and tune.share is not None:
        raise InputError("tune.share and tune.rows: both say what to choose by; leave one out, or set it to null")
    if tune.trials is not None and isinstance(tune.learning_rate, list):
        raise InputError("tune.trials: a list of rates is tried whole; give {low: .., high: ..} to try some of a range")
    if tune.learning_rate is not None:
        tune.rates()
    return tune


def _report(given: Mapping[str, Any], schema: Schema) -> dict[str, Any]:
    """What stands at `report:`, checked: two texts, and the method that the others are measured against."""
    known = ("title", "text", "reference")
    for key, value in given.items():
        if key not in known:
            raise InputError(f"report.{key}: there is no such key{nearest(key, known)}")
        if key != "reference" and not isinstance(value, str):
            raise InputError(f"report.{key} = {quoted(value)}: expected string")
    if "reference" not in given:
        return dict(given)
    try:
        reference = named("method", given["reference"])
        check_options("method", schema.methods, reference, fitted=True)
    except InputError as error:
        raise InputError(f"report.reference: {error}") from None
    return {**given, "reference": reference}


def _changed(settings: Sequence[tuple[str, Any]]) -> list[str]:
    """Of what was set on the command line what may be against a paper's protocol and no table shows."""
    shown_anyway = (*PLACE, "seed", "scale", "model", "report")
    return [f"{key}={json.dumps(value)}" for key, value in settings if key.partition(".")[0] not in shown_anyway]


def _published(given: Any) -> Published | None:
    """The section `published:`, checked; None where it is absent."""
    try:
        return None if given is None else Published.model_validate(given)
    except ValidationError:
        example = "`tables: [NAME, …]`, of `rankwise papers`, and perhaps `differs: WORDS`"
        raise InputError(f"published = {quoted(given)}: expected {example}") from None


def _chain(stages: Any, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The stages of `chain:`, checked; none where it is absent."""
    if stages is None:
        return []
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) and stage for stage in stages):
        raise InputError("chain: expected a list of settings, as in `chain: [{method.sparsity: 0.1}, {epochs: 1}]`")
    for key in (key for stage in stages for key in stage):
        if str(key).partition(".")[0] not in keys or key in (*PLACE, "model"):
            raise InputError(f"chain: {key} cannot differ between the stages of one chain{nearest(key, keys)}")
    return stages


def _check_link(before: RunConfig, config: RunConfig, schema: Schema) -> None:
    """Refuse a stage that cannot begin with what the one before has trained."""
    first, second = before.method["name"], config.method["name"]
    if first != second and not getattr(schema.methods[first], "whole", False):
        raise InputError(f"chain: {second} cannot follow {first}; only what trains the whole model can be followed so")


def _filled(
    key: str, entry: dict[str, Any], known: Mapping[str, type], vary: Mapping[str, Any], fitted: bool
) -> dict[str, Any]:
    """A method or task with its defaults written out; the settings of the run that it brings along are kept."""
    own = {option: entry[option] for option in OWN[key] if option in entry}
    given = {option: each for option, each in entry.items() if option not in own and f"{key}.{option}" not in vary}
    return {**check_options(key, known, given, fitted), **own}


def _override_experiment(
    data: dict[str, Any], vary: dict[str, list[Any]], key: str, value: Any, schema: Schema
) -> None:
    """Let an override win over the axes, where the plain value in `base` would be overruled by them unseen."""
    entries: list[dict[str, Any]] = vary.get("method", [])
    if key in ("method", "method.name") and entries and isinstance(value, str):
        vary["method"] = [entry for entry in entries if entry.get("name") == value] or [{"name": value}]
    elif key in vary:
        vary[key] = value if isinstance(value, list) else [value]
        if key in NAMED:
            vary[key] = [named(key, entry) for entry in vary[key]]
    elif key.partition(".")[0] in NAMED and vary.get(part := key.partition(".")[0]):
        option, known = key.partition(".")[2], getattr(schema, f"{part}s")
        having = [entry for entry in vary[part] if _has(known, entry, option)]
        if not having:
            names = {field.name for kind in known.values() for field in options_of(kind)}
            raise InputError(f"{key}: none of the varied {part}s has this option{nearest(option, names)}")
        for entry in having:
            entry |= with_nested(entry, option, value)
    elif key.startswith("trainer.") and "trainer" in vary:
        vary["trainer"] = [with_nested(entry, key.partition(".")[2], value) for entry in vary["trainer"]]
    else:
        put(data, key, value)
    for part, own in OWN.items():
        for entry in vary.get(part, []) if key in own else []:
            entry.pop(key, None)


def _has(known: Mapping[str, type], entry: Mapping[str, Any], option: str) -> bool:
    kind, option = known.get(str(entry.get("name"))), option.partition(".")[0]
    return kind is not None and option in {field.name for field in options_of(kind)}
