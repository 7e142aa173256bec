"""Settings as people look at them: what differs from the defaults, and what differs from run to run."""

from collections.abc import Iterable, Mapping
from typing import Any

from rankwise.named import asked
from rankwise.settings import PLACE, Experiment, RunConfig, as_yaml
from rankwise.settings.run import NAMED

OWN = {*PLACE, "learning_rate", "tuning", "tuned", "after", "followed"}
"""Settings that have a column anyway, or that `tune:`, `chain:` and the place of a run set."""


def dotted(config: RunConfig) -> dict[str, Any]:
    """The settings of a run, except those of OWN, by dotted keys: `{"seed": 0, "method": "lora", "method.rank": 4}`."""
    settings: dict[str, Any] = {}
    left = list(config.model_dump(mode="json", exclude=OWN).items())
    while left:
        key, value = left.pop(0)
        if isinstance(value, dict):
            left[:0] = [(key if below == "name" else f"{key}.{below}", each) for below, each in value.items()]
        else:
            settings[key] = value
    return settings


def differing(runs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys that have not the same value in all runs that have them; `runs` as `dotted` gives them."""
    values: dict[str, set[str]] = {}
    for settings in runs:
        for key, value in settings.items():
            values.setdefault(key, set()).add(repr(value))
    return [key for key, found in values.items() if len(found) > 1]


def as_text(config: RunConfig | Experiment, everything: bool) -> str:
    """YAML of what differs from the defaults; with `everything` that first, and below it the rest."""
    whole = config.model_dump(mode="json")
    if isinstance(config, RunConfig):
        changed = _changed(whole)
    else:
        changed = config.model_dump(mode="json", exclude_defaults=True)
        changed["base"] = _changed(whole["base"])
        changed["vary"] = {
            axis: [asked(axis, each) for each in values] if axis in NAMED else values
            for axis, values in whole["vary"].items()
        }
        changed |= {"chain": [_changed(stage) for stage in whole["chain"]]} if whole["chain"] else {}
    if not everything:
        return as_yaml(changed).rstrip()
    first = {key: _in_order(whole[key], value) for key, value in changed.items()}
    rest = {key: value for key, value in whole.items() if key not in changed}
    return as_yaml(first).rstrip() + (f"\n# as by default\n{as_yaml(rest).rstrip()}" if rest else "")


def _changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run without those that have their default values."""
    usual = {key: field.get_default(call_default_factory=True) for key, field in RunConfig.model_fields.items()}
    return {
        key: asked(key, value) if key in NAMED else value
        for key, value in settings.items()
        if key in NAMED or value != usual.get(key, ...)
    }


def _in_order(whole: Any, changed: Any) -> Any:
    """`whole` with what is in `changed` first, at every depth."""
    if isinstance(changed, dict) and isinstance(whole, dict):
        first = {key: _in_order(whole[key], value) for key, value in changed.items()}
        return {**first, **{key: value for key, value in whole.items() if key not in first}}
    if isinstance(changed, list) and isinstance(whole, list):
        return [_in_order(*both) for both in zip(whole, changed, strict=True)]
    return whole
