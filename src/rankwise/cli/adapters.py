"""The commands about adapters on disk, which need no base model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import Debug, Force, Json, Out, Picture, app
from rankwise.terminal import log, show, show_json

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="a PEFT adapter's folder, a run's, or a .safetensors file")
]


@app.command()
def resize(
    adapter: Adapter,
    out: Out,
    budget: Annotated[int | None, typer.Option("--budget", metavar="N", help="the most parameters")] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="R", help="the largest rank of a layer")] = None,
    keep_energy: Annotated[
        float | None,
        typer.Option("--keep-energy", metavar="E", help="the share of Σ‖ΔW‖² to keep, at the fewest parameters"),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--bytes", metavar="B", help="the most bytes of the file of weights")
    ] = None,
    picture: Picture = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut an adapter, of anyone's, to the best one within a limit, without its base model."""
    with redirect_stdout(sys.stderr):
        from rankwise.resizing import resize_adapter

        limits = {"budget": budget, "rank": rank, "keep_energy": keep_energy, "bytes": size}
        done = resize_adapter(adapter, out, **limits, force=force)  # type: ignore[arg-type]
    show_json(done.as_json()) if as_json else show(done.text())
    if picture is not None:
        log(f"picture: {done.save_picture(picture)}")
    log(f"wrote {out}")
