"""The commands that list what there is, count parameters, and check a method."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankwise.cli.options import Debug, Json, app
from rankwise.errors import FAILED
from rankwise.terminal import show, show_json


def _list_command(name: str, summary: str) -> None:
    """A command that prints what `rankwise.about` has under its name."""

    @app.command(name, help=summary)
    def command(as_json: Json = False, debug: Debug = False) -> None:
        from rankwise import about

        listing = getattr(about, name)()
        show_json(listing.content) if as_json else show(listing.text)


_list_command("methods", "List the methods and their options.")
_list_command("tasks", "List the tasks.")
_list_command("papers", "List the papers' tables and figures, and the experiment that is for each.")
_list_command("archs", "List the architectures that parameters can be counted for.")
_list_command("env", "Print versions, device and the environment variables that count.")


@app.command("check-method")
def check_method(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="Python file that holds the method")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="options by which the method is checked")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check that a method of your own keeps what every method promises; exit code 1 where it does not."""
    from rankwise.conformance import check_file

    findings = []
    for finding in check_file(file, settings or []):
        findings.append(finding)
        if not as_json:
            show(finding)
    if as_json:
        show_json([vars(finding) for finding in findings])
    if any(finding.broken for finding in findings):
        raise typer.Exit(FAILED)


@app.command()
def params(
    arch: Annotated[str, typer.Option("--arch", metavar="NAME", help="one of `rankwise archs`")],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="one of `rankwise methods`")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="options of the method, head=[MODULE,…] and plugins=[FILE.py]"),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count what a method trains on a model, without its weights."""
    from rankwise import about

    with redirect_stdout(sys.stderr):
        listing = about.params(arch, method, settings or [])
    show_json(listing.content) if as_json else show(listing.text)
