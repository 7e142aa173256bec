"""The commands about adapters on disk; except merge, they need no base model."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankwise.cli.options import Debug, Force, Json, Out, Picture, app, wrote_adapter
from rankwise.terminal import log, show, show_json

if TYPE_CHECKING:
    from rankwise.commands.resize import Resized

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help="a PEFT adapter's folder, a run's, or a .safetensors file")
]
Budget = Annotated[int | None, typer.Option("--budget", metavar="N", help="the most parameters of A and B")]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", help="the largest rank of a layer")]
KeepEnergy = Annotated[
    float | None,
    typer.Option("--keep-energy", metavar="E", help="the share of Σ‖ΔW‖² to keep, at the fewest parameters"),
]


@app.command()
def resize(
    adapter: Adapter,
    out: Out,
    budget: Budget = None,
    rank: Rank = None,
    keep_energy: KeepEnergy = None,
    size: Annotated[int | None, typer.Option("--bytes", metavar="B", help="the most bytes of the weights file")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="CONFIG.yaml", help="lose least on its training rows; loads the base model"),
    ] = None,
    picture: Picture = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut an adapter, whoever trained it, to the closest one within a limit, without its base model."""
    with redirect_stdout(sys.stderr):
        from rankwise.commands.resize import resize_adapter

        limits = {"budget": budget, "rank": rank, "keep_energy": keep_energy, "bytes": size}
        done = resize_adapter(adapter, out, **limits, data=data, force=force)  # type: ignore[arg-type]
    _tell(done, out, picture, as_json)


@app.command()
def ranks(
    adapter: Adapter,
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="OTHER", help="also show what another adapter has in common with it"),
    ] = None,
    picture: Picture = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the ranks of an adapter on disk, and how much it changes each layer."""
    with redirect_stdout(sys.stderr):
        from rankwise.commands.ranks import adapter_ranks

        found = adapter_ranks(adapter, compare)
    show_json(found.as_json()) if as_json else show(found.text())
    if picture is not None:
        log(f"picture: {found.save_picture(picture)}")


@app.command()
def mix(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER:WEIGHT", help="adapters of one model, as in a:0.7 b:0.3")
    ],
    out: Out,
    budget: Budget = None,
    rank: Rank = None,
    keep_energy: KeepEnergy = None,
    picture: Picture = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the weighted sum of adapters as one: exact, or the closest one within a limit."""
    with redirect_stdout(sys.stderr):
        from rankwise.commands.resize import mix as mixed
        from rankwise.commands.resize import weights

        done = mixed(weights(adapters), out, budget=budget, rank=rank, keep_energy=keep_energy, force=force)
    _tell(done, out, picture, as_json)


def _tell(done: Resized, out: Path, picture: Path | None, as_json: bool) -> None:
    show_json(done.as_json()) if as_json else show(done.text())
    if picture is not None:
        log(f"picture: {done.save_picture(picture)}")
    wrote_adapter(out)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="a PEFT adapter's folder, or a run's")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MODEL", help="the folder to write")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="MODEL", help="folder, hub name or GGUF file; else as the adapter says"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="NAME", help="fp32, bf16 or fp16; else that of the base")
    ] = None,
    quantise: Annotated[
        str | None,
        typer.Option("--quantise", metavar="NAME", help="4bit or 8bit, if it was trained on a base in 4 or 8 bits"),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="the largest weight file")
    ] = "5GB",
    gguf: Annotated[bool, typer.Option("--gguf", help="convert it for llama.cpp too, with its own converter")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace a model that is there already")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge an adapter into its base model: a plain model for transformers, or for llama.cpp."""
    with redirect_stdout(sys.stderr):
        from rankwise.commands.merge import merge as merged

        done = merged(
            adapter,
            out,
            base=base,
            dtype=dtype,
            quantise=quantise,
            max_shard_size=max_shard_size,
            gguf=gguf,
            force=force,
        )
    show_json(done.as_json()) if as_json else show(done.text())


@app.command()
def export(
    adapter: Adapter,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT", help="a new folder; a .safetensors file for diffusers")
    ],
    to: Annotated[
        str,
        typer.Option("--for", metavar="PROGRAM", help="peft, vllm, sglang, tgi, llama.cpp, diffusers, or portable"),
    ] = "portable",
    verify: Annotated[
        bool, typer.Option("--verify", help="compare ΔW of each layer, and the outputs in PEFT, with the adapter's")
    ] = False,
    push: Annotated[str | None, typer.Option("--push", metavar="REPO", help="put it on the hub as well")] = None,
    force: Force = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter, whoever trained it, in a form that a program reads right, and say which programs do not."""
    with redirect_stdout(sys.stderr):
        from rankwise.adapters.export import export_adapter

        done = export_adapter(adapter, out, to, verify=verify, push=push, force=force)
    show_json(done.as_json()) if as_json else show(done.text())
    log(f"wrote {out}")
