"""The commands that use an adapter, or look for one, with data."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import (
    Debug,
    Force,
    Jobs,
    Json,
    OneRun,
    Out,
    Picture,
    Repeat,
    Reuse,
    Settings,
    app,
    is_setting,
    source_of,
    svg,
    wrote_adapter,
)
from rankwise.errors import INTERRUPTED
from rankwise.terminal import log, show, show_json

Used = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER|RUN|MODEL", help="what is used, then settings such as task=… (key=value)"),
]
Rows = Annotated[str, typer.Option("--in", metavar="FILE", help="rows: .csv, .jsonl or .parquet; - for stdin")]


@app.command()
def predict(
    what: Used,
    rows: Rows = "-",
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="the same rows with answers; - for stdout")] = "-",
    force: Annotated[bool, typer.Option("--force", help="replace FILE if it is there")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer rows: classes with their probabilities, values or texts. After a kill the same command goes on."""
    from rankwise import api

    try:
        found = api.predict(what[0], rows, out, what[1:], force=force)
    except KeyboardInterrupt:
        log("stopped; the same command goes on from there" if out != "-" else "stopped")
        sys.exit(INTERRUPTED)
    if out != "-" and not isinstance(found, list):
        show_json(vars(found)) if as_json else log(f"{found.rows:,} rows: {out}")


@app.command()
def evaluate(
    what: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER|RUN|MODEL...", help="one or several, then settings such as task=… (key=value)"),
    ],
    rows: Annotated[
        str | None, typer.Option("--in", metavar="FILE", help="rows to score; by default those held out")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score adapters, runs or models on the same rows: those that the task holds out, or a file's."""
    from rankwise import api

    sources = [word for word in what if not is_setting(word)]
    settings = [word for word in what if is_setting(word)]
    with redirect_stdout(sys.stderr):
        found = api.evaluate(*sources, settings=settings, rows=rows)
    show_json(found.as_json()) if as_json else show(found.text())


@app.command()
def suggest(
    what: OneRun,
    budget: Annotated[
        int, typer.Option("--budget", min=1, metavar="N", help="trainable parameters at most, without the head")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="NAME.json|FOLDER", help="a LoraConfig, or an untrained adapter of it"),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="optimizer steps of each of the two searches")] = 100,
    picture: Picture = None,
    force: Annotated[bool, typer.Option("--force", help="replace the file or the adapter if it is there")] = False,
    jobs: Jobs = None,
    reuse: Reuse = False,
    repeat: Repeat = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Suggest ranks for a LoRA in any trainer, from two short searches on your data, and say how sure they are."""
    with redirect_stdout(sys.stderr):
        from rankwise import api

        source, settings = source_of(what)
        found = api.suggest(
            source, settings, budget=budget, steps=steps, out=out, force=force, jobs=jobs, reuse=reuse, repeat=repeat
        )
    snippets = found.snippets(out) if out else {}
    if as_json:
        show_json({**found.as_json(), "snippets": snippets})
    else:
        show("\n".join(found.lines()))
        for trainer, text in snippets.items():
            show("\n".join([f"\n{trainer}:", *(f"    {line}".rstrip() for line in text.splitlines())]))
    if picture is not None:
        log(f"picture: {found.save_picture(picture)}")
    if out:
        log(f"wrote {out}")


@app.command()
def shrink(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER|RUN", help="a PEFT adapter's folder, or a run's")],
    out: Out,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, metavar="T", help="by how much the task's score may be worse")
    ],
    settings: Settings = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="CONFIG.yaml|RUN", help="model and data to score on; by default a run's own"),
    ] = None,
    heal: Annotated[
        int, typer.Option("--heal", min=0, metavar="STEPS", help="train each cut on for so many steps")
    ] = 0,
    retrain: Annotated[
        bool,
        typer.Option("--retrain", help="train each size from the start instead of cutting"),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE.svg", callback=svg, help="draw score against bytes"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the smallest adapter that is not worse by more than a tolerance on held-out rows, and write it."""
    with redirect_stdout(sys.stderr):
        from rankwise import api

        found = api.shrink(
            adapter, data, settings or [], tolerance=tolerance, out=out, heal=heal, retrain=retrain, force=force
        )
    show_json(found.as_json()) if as_json else show("\n".join(found.lines()))
    if picture is not None:
        log(f"picture: {found.save_picture(picture)}")
    wrote_adapter(out)
