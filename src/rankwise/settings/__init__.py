"""What a user writes (YAML and key=value) turned into checked, frozen settings. No torch in here.

`load` is the one door: it reads a file, applies the overrides, checks every value against the schema of methods and
tasks that its caller hands in, and returns a `RunConfig` (one run) or an `Experiment` (a file with `vary:`).
Whatever is wrong comes back as one `InputError`, one line that says what is wrong and what would be right.
"""

from rankwise.settings.experiment import OWN, Contest, Experiment, Published, Span, Tune
from rankwise.settings.load import complete, load, load_method, load_options, load_task
from rankwise.settings.run import DECODER, FORMAT, PLACE, SECTIONS, WRITTEN, Kind, RunConfig, flattened, run_config
from rankwise.settings.schema import Schema, json_schema
from rankwise.settings.yaml_files import as_yaml, parse_yaml, read_yaml

__all__ = [
    "DECODER",
    "FORMAT",
    "OWN",
    "PLACE",
    "SECTIONS",
    "WRITTEN",
    "Contest",
    "Experiment",
    "Kind",
    "Published",
    "RunConfig",
    "Schema",
    "Span",
    "Tune",
    "as_yaml",
    "complete",
    "flattened",
    "json_schema",
    "load",
    "load_method",
    "load_options",
    "load_task",
    "parse_yaml",
    "read_yaml",
    "run_config",
]
