"""The commands about configuration files and the data that they name."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import All, Debug, Json, OneRun, Settings, app, source_of
from rankwise.terminal import ask, log, show, show_json, show_marked


@app.command()
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the file to write")] = Path("experiment.yaml"),
    data: Annotated[
        str | None, typer.Option("--data", help="a .csv, .json(l) or .parquet file, a folder, a name")
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", help="classification, pair, regression, seq2seq, causal, chat, instruct, text, segmentation"
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="column to read; two for a pair, a comma between")] = None,
    label: Annotated[str | None, typer.Option("--label", help="column to learn, or the classes of masks")] = None,
    model: Annotated[str | None, typer.Option("--model", help="folder or hub name of the base model")] = None,
    debug: Debug = False,
) -> None:
    """Write a commented experiment for data of your own, after four questions or from flags."""
    from rankwise import starter

    given = {"data": data, "type": kind, "text": text, "label": label, "model": model}
    starter.asked(given, ask if sys.stdin.isatty() else None).write(file)
    log(f"wrote {file}; next: rankwise validate {file}")


@app.command("import")
def carry_over(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="of axolotl or LLaMA-Factory, or adapter_config.json")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="the file to write, else NAME-rankwise.yaml"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the nearest file of rankwise for one of another trainer, and list what it could not carry over."""
    from rankwise import foreign

    out = out or Path(f"{file.stem}-rankwise.yaml")
    carried = foreign.carried(file)
    carried.write(out)
    show_json({"file": str(out), **carried.as_json()}) if as_json else show(carried.summary())
    log(f"wrote {out}; next: rankwise validate {out}")


@app.command()
def data(
    what: OneRun,
    row: Annotated[
        int | None, typer.Option("--row", min=0, help="one row in full, by its number or line in the file")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the model will see: tokens, which are learnt, lengths, what is cut, what is repeated."""
    with redirect_stdout(sys.stderr):
        from rankwise import api

        view = api.data(*source_of(what), row=row)
    show_json(view.as_json()) if as_json else show_marked(view.lines())


@app.command()
def validate(
    source: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a run or an experiment")],
    settings: Settings = None,
    everything: All = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a configuration and print what differs from the defaults."""
    from rankwise.sweep.changed import as_text
    from rankwise.sweep.check import Checked, memory_note

    checked = Checked.of(source, settings or [])
    show_json(checked.config.model_dump(mode="json")) if as_json else show(as_text(checked.config, everything))
    if not as_json:
        for line in (*memory_note(checked.runs), f"{source} is valid: {checked}"):
            log(line)


@app.command()
def schema(
    plugins: Annotated[
        list[Path] | None, typer.Argument(metavar="[PLUGIN.py ...]", help="files with methods and tasks of your own")
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of configuration files, for editors."""
    from rankwise import about

    show_json(about.schema(plugins or []))
