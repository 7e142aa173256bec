"""The commands that use an adapter, or look for one, with data."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import Debug, Jobs, Json, OneRun, Repeat, Reuse, app, source_of
from rankwise.terminal import log, show, show_json


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
    force: Annotated[bool, typer.Option("--force", help="replace what is there at --out")] = False,
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
        return
    show("\n".join(found.lines()))
    for trainer, text in snippets.items():
        show(f"\n{trainer}:\n" + "".join(f"    {line}\n" for line in text.splitlines()).rstrip("\n"))
    if out:
        log(f"wrote {out}")
