"""The command line. stdout carries the result, stderr the log.

Exit codes: 0 done, 1 failed, 2 something wrong with what the user gave, 3 some runs of a sweep failed, 75 stopped but
resumable, 130 interrupted. Everything heavy is imported inside the commands, so that `--help` is there at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from rankwise.errors import FAILED, INPUT, INTERRUPTED, SOME_FAILED, STOPPED

if TYPE_CHECKING:
    from rankwise.results.summary import Summary
    from rankwise.runs.maker import Maker
    from rankwise.runs.store import Store
    from rankwise.settings import RunConfig
    from rankwise.sweep.compare import Outcome
    from rankwise.sweep.plan import Plan
    from rankwise.sweep.runners import Runner

TELL_AFTER = 20.0
"""Seconds until one of several processes tells its error. One line is enough: where all fail alike, the main one tells
at once and ends, upon which the launcher ends the others; and so where another process is lost."""

app = typer.Typer(
    name="rankwise",
    help="Fine-tune with low-rank adapters, learn where the rank belongs, compare methods fairly.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings that win over the file's")]
Runs = Annotated[Path, typer.Argument(metavar="RUNS", help="folder of runs")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done and do nothing")]
Reuse = Annotated[bool, typer.Option("--reuse", help="keep and go on with what other code or data has made")]
Repeat = Annotated[bool, typer.Option("--repeat", help="carry out again what other code or data has made")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, help="runs at once; as many as there is room for when not given"),
]
RunnerName = Annotated[str, typer.Option("--runner", metavar="NAME", help="where the runs are carried out; see below")]
RunnerOptions = Annotated[
    list[str] | None,
    typer.Option("--runner-option", "-o", metavar="KEY=VALUE", help="an option of the runner; may be given again"),
]


class _Sweeping(typer.core.TyperCommand):
    """A command that carries out runs: its help ends with the runners and their options."""

    def get_help(self, ctx: Any) -> str:
        from rankwise.sweep.runners import registry

        return "\n\n".join([super().get_help(ctx), *(_about(f"--runner {n}", kind) for n, kind in registry().items())])


def _about(title: str, kind: type) -> str:
    """A dataclass's docstring as help for its options, with their defaults."""
    import dataclasses
    import inspect

    text = f"{title}: {inspect.getdoc(kind)}".replace("\n\nAttributes:\n", "\n")
    for field in dataclasses.fields(kind):
        value = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and value is not None:
            brief = _brief(list(value) if isinstance(value, tuple) else value)
            text = text.replace(f"\n    {field.name}: ", f"\n    {field.name}={brief}: ")
    return text


@app.command()
def train(
    what: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG.yaml|RUN_FOLDER|KEY=VALUE", help="one run: a file or folder, then settings"),
    ],
    reuse: Reuse = False,
    repeat: Repeat = False,
    as_json: Json = False,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Carry out one run, from the start or from where it was stopped."""
    from rankwise.errors import InputError
    from rankwise.processes.launched import is_main, launched
    from rankwise.runs.run_file import maker_of
    from rankwise.runs.store import Store

    launched()  # before a folder is made
    source, settings = (None, what) if _is_setting(what[0]) else (Path(what[0]), what[1:])
    noted = None if source is None or source.is_dir() else maker_of(source)
    from rankwise.sweep import plan  # imports torch: what is wrong with the file's name is said before

    if source is not None and source.is_dir():
        if settings:
            raise InputError(f"{settings[0]}: the settings of a run are in its run.yaml and stay as they are")
        folder, store = source, Store(source.parent)
        if dry_run:
            _print_settings(store.config(folder), folder, as_json)
            return
        if is_main():
            plan.settle_begun(store, [folder], reuse, repeat)
    else:
        config = plan.alone(plan.load_run(source, settings), tries=noted is not None)
        plan.check_models([config], dry_run)
        store = Store(config.runs)
        folder = store.place(config)
        if is_main():
            made = plan.makers(store, [config])(config)
            if source is not None and noted is not None:
                _say_what_differs(source, noted, made)
        if dry_run:
            _print_settings(config, folder, as_json)
            return
        if is_main():
            store.check_before(config, made)
            plan.settle(store, {folder: made}, reuse, repeat)
            store.create(config, made)
    from rankwise.train.run import run

    with contextlib.redirect_stdout(sys.stderr):
        result = run(folder)
    if not is_main():
        return
    if as_json:
        _print_json(result)
    else:
        from rankwise.results.summary import Summary

        split = result["splits"]["evaluation"][0]
        tried = f"{result['score']} {result['metrics'].get(result['score'])} on {split['rows']} rows of {split['name']}"
        summary = Summary.of(store.results([folder])).text()
        _print(summary or f"learning rate {result['learning_rate']:g}, tried for its experiment: {tried}")
        _print(f"\nrun: {folder}")


def _is_setting(word: str) -> bool:
    """Whether a word is `key=value` and no file with a `=` in its name."""
    try:
        return "=" in word and not Path(word).exists()
    except OSError:  # too long for a name
        return True


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
    debug: Debug = False,
) -> None:
    """Carry out an experiment, or what is left of it, and compare its methods."""
    sweep = _runner(runner, jobs, runner_options or [])
    from rankwise.sweep.plan import Plan, load_experiment

    plan = Plan.of(load_experiment(source, settings or []), dry_run)
    if dry_run:
        _print_plan(plan, as_json)
    else:
        _conclude(plan.store, *plan.carry_out(sweep, reuse, repeat), as_json)


@app.command()
def status(
    runs: Runs,
    watching: Annotated[bool, typer.Option("--watch", help="on a terminal keep the table until all is done")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say how the runs of a folder stand, and about how long they will still take."""
    from rich.console import Console

    from rankwise.results.formats import plain
    from rankwise.runs.store import Store
    from rankwise.sweep.watch import HEADER, Watch, watch

    store, console = Store(runs), Console()
    if watching and not as_json and console.is_terminal:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # so that the terminal is left as it was
        try:
            watch(store, console)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        return
    store.tidy(store.folders())
    look = Watch(store).look()
    if as_json:
        _print_json(
            [
                {
                    "run": each.folder.name,
                    "learning_rate": each.learning_rate,
                    "tries": each.tries,
                    "planned": each.planned,
                    "state": each.state,
                    "step": each.step,
                    "steps": each.steps,
                }
                | {"seconds_left": round(look.left[each.folder]) if each.folder in look.left else None}
                | ({"error": each.error} if each.error else {})
                for each in look.standings
            ]
        )
        return
    _print(f"{runs}: {look.head()}")
    if look.standings:
        _print(plain(HEADER, look.rows()))
    if note := store.left_out():
        _print(f"\nIn a report {note}")


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
    from rankwise.runs.store import Store
    from rankwise.sweep.compare import carry_out
    from rankwise.sweep.plan import settle_begun

    sweep = _runner(runner, jobs, runner_options or [])
    store = Store(runs)
    failed = [
        folder
        for folder in store.folders()
        # a rate at which training diverges is out, and would diverge again
        if store.state(folder) == "failed" and not (store.tries(folder) and store.failure(folder).diverged)
    ]
    if not failed:
        _print(f"{runs}: no run has failed", file=sys.stderr)
    settle_begun(store, failed, reuse, repeat)
    _conclude(store, carry_out(store, failed, sweep), store.folders(), as_json)


@app.command()
def report(
    runs: Runs,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write one offline page")] = None,
    md: Annotated[bool, typer.Option("--md", help="print the table as Markdown")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="print the table as CSV")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="print the table as LaTeX")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what the finished runs of a folder say: a table on stdout, or a page."""
    from rankwise.errors import InputError
    from rankwise.results.summary import Summary
    from rankwise.runs.store import Store

    if sum((md, csv, latex, as_json)) > 1:
        raise InputError("--md, --csv, --latex and --json: choose one; stdout holds one table")
    store = Store(runs)
    results = store.results()
    if not results and not store.folders():
        raise InputError(f"{runs}: there is no run in it")
    if not results:
        raise InputError(f"{runs}: no run in it has finished; `rankwise status {runs}` says how they stand")
    if html:
        from rankwise.report.html import write

        _print(f"report: {write(runs, html)}", file=sys.stderr)
    if md or csv or latex:
        from rankwise.report import tables
        from rankwise.results.rows import best, summarise

        if note := store.left_out():
            _print(note, file=sys.stderr)
        form: Callable[..., str] = tables.markdown if md else tables.csv if csv else tables.latex
        _print(form(best(summarise(results))))
    elif as_json or not html:
        summary = Summary.of_store(store)
        _print(_json(summary.as_json()) if as_json else summary.text())


@app.command()
def validate(
    source: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a run or an experiment")],
    settings: Settings = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a configuration and print it with all defaults filled in."""
    import yaml

    from rankwise.settings import RunConfig, load
    from rankwise.sweep import plan
    from rankwise.sweep.progress import counted

    config = load(source, settings or [], plan.schema())
    if isinstance(config, RunConfig):
        config = plan.alone(config)
        runs = [config]
    else:
        plan.check_tables(config)
        runs = plan.expand(config)
    plan.check_models(runs, shipped=True)
    content = config.model_dump(mode="json")
    if as_json:
        _print_json(content)
        return
    _print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip())
    if isinstance(config, RunConfig):
        count = "one run"
    else:
        tuned = ", behind those that choose their learning rates" if config.tune else ""
        count = f"an experiment of {counted(len(runs))}{tuned}"
    _print(f"{source} is valid: {count}", file=sys.stderr)


@app.command()
def schema(debug: Debug = False) -> None:
    """Print the JSON schema of configuration files, for editors."""
    from rankwise.settings import json_schema
    from rankwise.sweep import plan

    _print_json(json_schema(plan.schema()))


@app.command()
def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the methods and their options."""
    from rankwise.methods import registry

    options = _options("method")
    found: dict[str, dict[str, Any]] = {
        name: {"summary": (method.__doc__ or "").strip().partition("\n")[0], "options": options[name]}
        for name, method in sorted(registry().items())
    }
    if as_json:
        _print_json(found)
        return
    for name, about in found.items():
        _print(f"{name}: {about['summary']}")
        for option, default in about["options"].items():
            _print(f"  {option} = {json.dumps(default)}")


@app.command()
def tasks(as_json: Json = False, debug: Debug = False) -> None:
    """List the tasks."""
    from rankwise.results.formats import plain
    from rankwise.tasks import registry

    options = _options("task")
    found: dict[str, dict[str, Any]] = {
        name: {
            "summary": (task.__doc__ or "").strip().partition("\n")[0],
            "score": task.main,
            "metrics": list(task.metrics),
            "text": list(task.text) if isinstance(task.text, tuple) else None,
            "labels": list(task.labels) if isinstance(task.labels, tuple) else None,
            "options": options.get(name, {}),
        }
        for name, task in registry().items()
    }
    if as_json:
        _print_json(found)
        return
    _print(plain(["task", "metrics", "about"], [[n, ", ".join(t["metrics"]), t["summary"]] for n, t in found.items()]))


@app.command()
def papers(as_json: Json = False, debug: Debug = False) -> None:
    """List the papers' tables and figures, and the experiment that is for each."""
    from dataclasses import asdict

    from rankwise.published import papers
    from rankwise.results.formats import plain

    if as_json:
        _print_json([asdict(paper) for paper in papers()])
        return
    parts = []
    for paper in papers():
        rows = [
            [table.id, f"{table.kind} {table.number}", str(table.numbers), table.experiment] for table in paper.tables
        ]
        parts.append(f"{paper.source}\n\n{plain(['name', 'there', 'numbers', 'experiments/'], rows)}")
    _print("\n\n".join(parts))


@app.command()
def archs(as_json: Json = False, debug: Debug = False) -> None:
    """List the architectures that parameters can be counted for."""
    from rankwise.archs import archs
    from rankwise.results.formats import plain

    found = archs()
    if as_json:
        _print_json({a.name: {"source": a.source, "built_as": a.built_as, "config": a.config} for a in found.values()})
        return
    rows = [[a.name, a.built_as, str(a.layers), str(a.width), a.source] for a in found.values()]
    _print(plain(["arch", "built as", "layers", "width", "source"], rows))


@app.command()
def params(
    arch: Annotated[str, typer.Option("--arch", metavar="NAME", help="one of `rankwise archs`")],
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="one of `rankwise methods`")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="options of the method, and head=[MODULE,…]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Count what a method trains on a model, without its weights."""
    from rankwise.archs import find
    from rankwise.published import labels

    chosen = find(arch)
    with contextlib.redirect_stdout(sys.stderr):
        import rankwise.methods
        from rankwise.settings import Schema, load_method
        from rankwise.train.params import count

        options, head = load_method(method, settings or [], Schema(rankwise.methods.registry(), {}))
        counted = count(chosen, rankwise.methods.build(options), head)
    beside = labels(arch, method, options)
    if as_json:
        _print_json({**counted.as_json(), "published": [vars(label) for label in beside]})
        return
    given = " ".join([method, *(f"{key}={_brief(value)}" for key, value in options.items() if key != "name")])
    final = "depends on what is learnt" if counted.final is None else f"{counted.final:,}"
    lines = {
        "arch": f"{arch} ({chosen.source}), built as {chosen.built_as}",
        "method": given,
        "trainable": f"{counted.trainable:,}",
        "head": f"{counted.head:,} of these, in {', '.join(head)}" if head else "not counted",
        "final": final if counted.final in (None, counted.trainable) else f"{final} at most",
        "total": f"{counted.total:,}",
        "percent": f"{counted.percent:.4g}",
        "published": "\n           ".join(map(str, beside)) or "-",
    }
    for key, value in lines.items():
        _print(f"{key:<9}  {value}")


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_brief, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@app.command()
def env(as_json: Json = False, debug: Debug = False) -> None:
    """Print versions, device and the environment variables that count."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import rankwise
    from rankwise.sweep.runners.local import cores

    found: dict[str, Any] = {"rankwise": rankwise.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "accelerate", "datasets", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found["cores"] = cores()
    for name in ("RANKWISE_DATA", "HF_HOME", "HF_HUB_OFFLINE"):
        found[name] = os.environ.get(name)
    if as_json:
        _print_json(found)
        return
    for key, value in found.items():
        _print(f"{key}: {'-' if value is None else value}")


def main() -> None:
    """Run the command line and leave with one of the exit codes in `rankwise.errors`."""
    # A result in UTF-8 whatever the terminal says, so that no ± stops a finished sweep.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # What PEFT imports where it is there says on CPUs what a faster path would need; no run here takes that path.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        code = app(prog_name="rankwise", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        from rankwise.errors import InputError
        from rankwise.processes.launched import LostError, is_main

        if isinstance(error, LostError) or not is_main():
            time.sleep(TELL_AFTER)
        if "--debug" in sys.argv:
            raise
        if hasattr(error, "format_message"):  # a usage error, which typer would spread over four lines
            _refuse_usage(error)
        line = " ".join(filter(None, map(str.strip, str(error).splitlines()))) or type(error).__name__
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whoever opens it, the user gave it
            error, line = InputError(line), f"{line[:120]}… is no name of a file: give a shorter one"
        if isinstance(error, InputError):
            _print(f"rankwise: {line}", file=sys.stderr)
            sys.exit(INPUT)
        _print(f"rankwise: {type(error).__name__}: {line} (--debug shows where)", file=sys.stderr)
        sys.exit(FAILED)


def _refuse_usage(error: Any) -> NoReturn:
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "rankwise"
    if len(sys.argv) == 1:  # rankwise alone: its help is what was wanted
        _print(context.get_help() if context else error.format_message())
    else:
        _print(f"rankwise: {' '.join(error.format_message().split())} (see {command} --help)", file=sys.stderr)
    sys.exit(INPUT)


def _options(key: str) -> dict[str, dict[str, Any]]:
    """The options of every method or task, by its name, with their defaults."""
    from rankwise.settings import json_schema
    from rankwise.sweep import plan

    return {
        entry["properties"]["name"]["const"]: {
            option: value.get("default") for option, value in entry["properties"].items() if "const" not in value
        }
        for entry in json_schema(plan.schema())["properties"][key]["oneOf"]
        if "properties" in entry
    }


def _say_what_differs(source: Path, noted: Maker, made: Maker) -> None:
    from rankwise.runs.maker import said

    differences = made.differs(noted)
    words = f"was made with {said(differences)}" if differences else "was made with the code and data that are here"
    _print(f"{source}: {words}", file=sys.stderr)


def _runner(name: str, jobs: int | None, options: Sequence[str]) -> Runner:
    from rankwise.sweep.runners import runner

    return runner(name, [*options, *([f"jobs={jobs}"] if jobs else [])])


def _conclude(store: Store, outcome: Outcome, shown: Sequence[Path], as_json: bool) -> None:
    """Print what the runs in `shown` say, write the page, and leave with the exit code."""
    from rankwise.results.summary import Summary

    summary = Summary.of_store(store, shown)
    if not as_json:
        _print(summary.text())
    page = _page(store, summary, whole=sorted(shown) == store.folders())
    if as_json:
        _print_json(
            {
                "runs": str(store.folder),
                **{state: [path.name for path in getattr(outcome, state)] for state in ("done", "failed", "stopped")},
                **summary.as_json(),
                "report": str(page) if page else None,
            }
        )
    elif page:
        _print(f"\nreport: {page}")
    code = _exit_code(store, outcome)
    if code:
        sys.exit(code)


def _page(store: Store, summary: Summary, whole: bool) -> Path | None:
    """The report of the whole folder. What hinders it is only said: the results are worth more than the page.

    Where the summary is of the `whole` folder, nothing is computed anew.
    """
    if not summary.rows:
        return None
    try:
        from rankwise.report.html import write

        return write(store.folder, None, summary if whole else None)
    except Exception as error:
        _print(f"no report.html: {' '.join(str(error).split())}", file=sys.stderr)
        return None


def _exit_code(store: Store, outcome: Outcome) -> int:
    from rankwise.sweep.progress import counted

    if outcome.failed:
        lasting = sum(store.failure(folder).lasting for folder in outcome.failed)
        if again := len(outcome.failed) - lasting:
            it = "it" if again == 1 else "them"
            _print(f"{counted(again)} failed; `rankwise retry {store.folder}` carries {it} out again", file=sys.stderr)
        if lasting:
            errors = "its error names" if lasting == 1 else "their errors name"
            _print(
                f"{counted(lasting)} failed and would again until what {errors} is changed; "
                f"`rankwise status {store.folder}` shows {'it' if lasting == 1 else 'them'}",
                file=sys.stderr,
            )
        return SOME_FAILED
    if outcome.stopped:
        stopped = len(outcome.stopped)
        said = "1 run was stopped; the same command goes on with it"
        if stopped != 1:
            said = f"{stopped} runs were stopped; the same command goes on with them"
        _print(said, file=sys.stderr)
        return STOPPED
    return 0


def _print_settings(config: RunConfig, folder: Path, as_json: bool) -> None:
    import yaml

    content = config.model_dump(mode="json")
    _print(_json(content) if as_json else yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip())
    _print(f"dry run: would be carried out in {folder}", file=sys.stderr)


def _print_plan(plan: Plan, as_json: bool) -> None:
    from rankwise.results.formats import plain
    from rankwise.sweep.plan import made_by_others
    from rankwise.sweep.progress import counted

    if others := plan.store.others(plan.wanted):
        _print(f"{made_by_others(plan.store, others)}; wants --reuse or --repeat", file=sys.stderr)
    if as_json:
        _print_json(plan.as_json())
    else:
        header, rows = plan.table()
        _print(plain(header, rows))
        left = sum(row[-1] != "done" for row in rows)
        _print(f"{counted(len(plan.runs))} in {plan.store.folder}, {left} to carry out", file=sys.stderr)
    for line in plan.following():
        _print(line, file=sys.stderr)


def _json(content: Any) -> str:
    text = json.dumps(content, indent=1, ensure_ascii=False, default=str)
    # what a terminal would act upon, as JSON spells it
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def _print(text: object, file: Any = None) -> None:
    """Every text that is printed comes through here, since any of it may hold a name that others have given."""
    from rankwise.errors import shown

    print(shown(str(text)), file=file)


def _print_json(content: Any) -> None:
    _print(_json(content))
