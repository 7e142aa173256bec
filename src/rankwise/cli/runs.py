"""The commands that carry out runs, and those about a folder of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rankwise.cli.options import (
    All,
    Debug,
    DryRun,
    Jobs,
    Json,
    OneRun,
    Repeat,
    Reuse,
    RunnerName,
    RunnerOptions,
    Runs,
    Settings,
    app,
    source_of,
)
from rankwise.errors import INTERRUPTED, InputError
from rankwise.terminal import agreed, log, show, show_json

if TYPE_CHECKING:
    from rankwise.api import Comparison, Report
    from rankwise.sweep.plan import Plan


class _Sweeping(typer.core.TyperCommand):
    """A command that carries out runs: its help ends with the runners and their options."""

    def get_help(self, ctx: Any) -> str:
        from rankwise.sweep.runners import described

        return f"{super().get_help(ctx)}\n\n{described()}"


@app.command()
def train(
    what: OneRun,
    reuse: Reuse = False,
    repeat: Repeat = False,
    as_json: Json = False,
    dry_run: DryRun = False,
    everything: All = False,
    debug: Debug = False,
) -> None:
    """Carry out one run, from the start or from where it was stopped."""
    from rankwise import api
    from rankwise.processes.launched import is_main
    from rankwise.sweep.changed import as_text
    from rankwise.sweep.check import memory_note

    one = api.one(*source_of(what), dry_run)
    if one.differs:
        log(one.differs)
    if dry_run:
        show_json(one.config.model_dump(mode="json")) if as_json else show(as_text(one.config, everything))
        for line in (*memory_note([one.config]), f"dry run: would be carried out in {one.folder}"):
            log(line)
        return
    trained = api.Trained(one.folder, one.carry_out(reuse, repeat))
    if not is_main():
        return
    if as_json:
        show_json(trained.result)
    else:
        show(trained.text())
        show("\n" + "\n".join(filter(None, [trained.ending(), f"run: {trained.folder}"])))


@app.command(cls=_Sweeping)
def compare(
    source: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="an experiment: a file with `vary:`")],
    settings: Settings = None,
    jobs: Jobs = None,
    runner: RunnerName = "local",
    runner_options: RunnerOptions = None,
    reuse: Reuse = False,
    repeat: Repeat = False,
    as_json: Json = False,
    dry_run: DryRun = False,
    everything: All = False,
    debug: Debug = False,
) -> None:
    """Carry out an experiment, or what is left of it, and compare its methods."""
    from rankwise import api

    sweep = api.runner_of(runner, runner_options or [], jobs)
    plan = api.plan(source, settings or [], dry_run)
    if dry_run:
        _print_plan(plan, as_json, everything)
    else:
        _conclude(api.Comparison.of(plan.store, *plan.carry_out(sweep, reuse, repeat)), as_json)


@app.command()
def status(
    runs: Runs,
    watching: Annotated[bool, typer.Option("--watch", help="on a terminal keep the table until all is done")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say how the runs of a folder stand, and about how long they will still take."""
    from rich.console import Console

    from rankwise.runs.store import Store
    from rankwise.sweep.watch import Watch, watch

    store, console = Store(runs), Console()
    if watching and not as_json and console.is_terminal:
        sys.exit(0 if watch(store, console) else INTERRUPTED)
    store.tidy(store.folders())
    look = Watch(store).look()
    if as_json:
        show_json(look.as_json())
        return
    show(f"{runs}: {look.head()}")
    if look.standings:
        show(look.table())
    if note := store.left_out():
        show(f"\nIn a report {note}")


@app.command(cls=_Sweeping)
def retry(
    runs: Runs,
    jobs: Jobs = None,
    runner: RunnerName = "local",
    runner_options: RunnerOptions = None,
    reuse: Reuse = False,
    repeat: Repeat = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Carry out the failed runs of a folder again, and no others."""
    from rankwise import api

    options = runner_options or []
    _conclude(api.retry(runs, jobs=jobs, runner=runner, options=options, reuse=reuse, repeat=repeat), as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="folders of runs, several read as one")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write one offline page")] = None,
    md: Annotated[bool, typer.Option("--md", help="print the table as Markdown")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="print the table as LaTeX")] = False,
    columns: Annotated[
        str, typer.Option("--columns", metavar="NAME,NAME…", help="of that table, by heading or by name in the CSV")
    ] = "",
    caption: Annotated[str, typer.Option("--caption", metavar="TEXT", help="of the Markdown or LaTeX table")] = "",
    bold: Annotated[bool, typer.Option("--bold", help="the best score of each task in bold, in such a table")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the finished runs of one folder or several say: a table on stdout, or a page."""
    from rankwise import api

    if sum((md, csv, latex, as_json)) > 1:
        raise InputError("--md, --csv, --latex and --json: choose one; stdout holds one table")
    form: api.Form | None = "md" if md else "csv" if csv else "latex" if latex else None
    if (columns and form is None) or ((caption or bold) and form in (None, "csv")):
        raise InputError("--columns is for --md, --csv and --latex, --caption and --bold are for --md and --latex")
    found = api.report(*runs)
    _say_damage(found)
    if html:
        log(f"report: {found.write_page(html)}")
    if form:
        if found.left_out:
            log(found.left_out)
        names = [name.strip() for name in columns.split(",") if name.strip()]
        show(found.table(form, names, caption, bold))
    elif as_json or not html:
        show_json(found.as_json()) if as_json else show(found.text())


@app.command()
def clean(
    runs: Runs,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="KIND", help="failed, stopped or foreign; repeat for several; all if not given"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="delete without asking, finished runs too")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Delete runs that failed, were stopped, or are foreign: not part of the folder's current experiment.

    Foreign runs are deleted with their results and adapters even if they are finished.
    """
    from rankwise.results.formats import plain
    from rankwise.runs.store import Store
    from rankwise.sweep.clean import remove, summary, unneeded

    found = unneeded(Store(runs), only or [])
    if found and not as_json:
        show(plain(["run", "state", "why"], [each.row() for each in found]))
    if not found:
        log(f"{runs}: nothing to delete")
    elif not yes and not agreed(f"delete {summary(found)}?"):
        found = []
    kept = {each.folder.name: remove(each.folder) for each in found}
    for name, others in kept.items():
        if others:
            log(f"{name}: kept {', '.join(others)}, not written by rankwise")
    if as_json:
        show_json({"deleted": [*kept]})
    elif found:
        log(f"deleted {summary(found)}")


def _say_damage(found: Report) -> None:
    if found.damage:
        log(f"rankwise: {found.damage}; without it the report says nothing about the experiment")


def _conclude(found: Comparison, as_json: bool) -> None:
    """Print what the runs say, write the page, and leave with the exit code."""
    _say_damage(found)
    if not as_json:
        show(found.text())
    page = _page(found)
    if as_json:
        show_json({**found.as_json(), "report": str(page) if page else None})
    elif page:
        show(f"\nreport: {page}")
    for line in found.left():
        log(line)
    if found.code:
        sys.exit(found.code)


def _page(found: Comparison) -> Path | None:
    """The report of the whole folder. What hinders it is only said: the results are worth more than the page."""
    if not found.rows:
        return None
    try:
        return found.write_page()
    except Exception as error:
        log(f"no report.html: {' '.join(str(error).split())}")
        return None


def _print_plan(plan: Plan, as_json: bool, everything: bool) -> None:
    if others := plan.made_by_others():
        log(f"{others}; wants --reuse or --repeat")
    show_json(plan.as_json()) if as_json else show(plan.text(everything))
    for line in plan.following(as_json):
        log(line)
