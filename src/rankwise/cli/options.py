"""The program, and the arguments that several of its commands take."""

from pathlib import Path
from typing import Annotated

import typer

from rankwise.errors import InputError, need
from rankwise.terminal import log

app = typer.Typer(
    name="rankwise",
    help="Fine-tune with low-rank adapters, learn where the rank belongs, compare methods fairly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def svg(file: Path | None) -> Path | None:
    """The file of a picture. InputError where it cannot be drawn."""
    if file is not None and file.suffix != ".svg":
        raise InputError(f"{file}: pictures are SVG: give a name that ends in .svg")
    if file is not None:
        need("matplotlib", "bench")  # before anything is written
    return file


OneRun = Annotated[
    list[str],
    typer.Argument(metavar="CONFIG.yaml|RUN_FOLDER|KEY=VALUE", help="one run: a file or folder, then settings"),
]
Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings that win over the file's")]
Runs = Annotated[Path, typer.Argument(metavar="RUNS", help="folder of runs")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done and do nothing")]
Reuse = Annotated[bool, typer.Option("--reuse", help="keep and go on with what other code or data has made")]
Repeat = Annotated[bool, typer.Option("--repeat", help="carry out again what other code or data has made")]
All = Annotated[bool, typer.Option("--all", help="print all settings, those that differ from the defaults first")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="where to write it, in the same format")]
Force = Annotated[bool, typer.Option("--force", help="replace an adapter that is there already")]
Picture = Annotated[
    Path | None,
    typer.Option("--picture", metavar="FILE.svg", callback=svg, help="draw the ranks, by layer and projection"),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="runs at once; as many as there is room for when not given"),
]
RunnerName = Annotated[str, typer.Option("--runner", metavar="NAME", help="where the runs are carried out; see below")]
RunnerOptions = Annotated[
    list[str] | None,
    typer.Option("--runner-option", "-o", metavar="KEY=VALUE", help="an option of the runner; may be given again"),
]


def source_of(what: list[str]) -> tuple[Path | None, list[str]]:
    """What `OneRun` took: a file or a folder, None without one, and settings."""
    return (None, what) if is_setting(what[0]) else (Path(what[0]), what[1:])


def is_setting(word: str) -> bool:
    """Whether a word is `key=value` and no file with a `=` in its name."""
    try:
        return "=" in word and not Path(word).exists()
    except OSError:  # too long for a name
        return True


def wrote_adapter(out: Path) -> None:
    """Say where an adapter was written, and which programs need to know of its ranks."""
    from rankwise.adapters.layouts import reading
    from rankwise.adapters.stored import stored

    log(f"wrote {out}")
    if said := reading(stored(out)):
        log(said)
