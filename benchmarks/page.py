"""What docs/performance.md says of the results of `benchmarks/suite.py`: its tables and its pictures."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots

from rankwise.files import write_whole
from rankwise.pictures.style import svg

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
NAMES = {
    "bert": "MiniLM's shape",
    "llama": "small decoder",
    "llama-2048": "Llama, d 2,048",
    "llama-4096": "Llama, d 4,096",
}
OURS = {
    "lora": "LoRA",
    "lora, fast: false": "LoRA, fast: false",
    "lora, lean": "LoRA, activation_memory: lean",
    "lora, shrunk": "LoRA after shrinking",
}
OTHERS = "results-*.json"
"""Beside `results.json`: what other machines have measured."""
Results = dict[str, Any]
Cell = tuple[str, bool | None]
"""What was measured, and whether the goal is met; None where it was not measured."""


NOTHING = "Not measured yet."


def table(titles: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return NOTHING
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ratio(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def arm(name: str) -> str:
    return name if name.startswith(("PEFT", "full")) else "rankwise " + OURS.get(name, name)


def _rows(result: dict[str, Any], key: str) -> dict[str, Any]:
    return {row["arm"]: row[key] for row in result["rows"]}


# --- one part


def section(name: str, result: dict[str, Any]) -> str:
    """The table of one part, for the terminal."""
    kind = name.partition("-")[0]
    body = SECTIONS[kind](result)
    rounds = "1 round" if result["rounds"] == 1 else f"{result['rounds']} rounds"
    return f"{name}, {result['machine']['device']}, {rounds}, {result['seconds']} s\n\n{body}\n"


def _steps(result: dict[str, Any]) -> str:
    rows = []
    for row in result["rows"]:
        ratios = [ratio(row[f"over {other}"]) for other in ("limit", "PEFT LoRA", "lora")]
        rows.append([arm(row["arm"]), *ratios, f"{row['optimizer'][1]:.1%}"])
    return table(["step", "÷ limit", "÷ PEFT LoRA", "÷ rankwise LoRA", "of it, the optimizer"], rows)


def _memory(result: dict[str, Any]) -> str:
    rows = [
        [arm(row["arm"]), *(f"{row[key] / 1e6:.1f} MB, {row[f'{key} over limit']:.3f}" for key in ("kept", "peak"))]
        for row in result["rows"]
    ]
    return table(["memory", "saved for the backward pass, ÷ limit", "growth in a step, ÷ limit"], rows)


def _changes(result: dict[str, Any]) -> str:
    rows = [[NAMES[row["shape"]], str(row["sites"]), f"{row['share'][1]:.1e}"] for row in result["rows"]]
    return table(["three rank changes in 1,000 steps", "sites", "share of the run"], rows)


def _error(result: dict[str, Any]) -> str:
    rows = [
        ["×".join(map(str, row["shape"])), " → ".join(map(str, row["ranks"])), f"{row['above']:.1e}"]
        for row in result["rows"]
    ]
    return table(["W", "rank", "error above the smallest possible"], rows)


def _help(result: dict[str, Any]) -> str:
    return table(["process", "s"], [[f"`{row['command']}`", ratio(row["seconds"])] for row in result["rows"]])


def _profile(result: dict[str, Any]) -> str:
    whole = sum(result["rows"][0]["seconds"].values())
    groups = [*result["rows"][0]["seconds"]]
    rows = []
    for row in result["rows"]:
        shares = [row["seconds"][group] / whole for group in groups]
        name = "the limit without LoRA's products" if row["arm"] == "limit" else arm(row["arm"])
        rows.append([name, *(f"{share:.1%}" for share in shares), f"{sum(shares):.1%}", f"{row['reads']:.0f}"])
    return table(["time of a step, by operations", *groups, "all", "numbers read by the host"], rows)


def profile(results: Results) -> str:
    parts = [f"profile-{shape}-{rank}" for shape in NAMES for rank in (8, 32, 64)]
    there = [f"{_named(part)}:\n\n{_profile(results[part])}" for part in parts if part in results]
    return "\n\n".join(there) or NOTHING


def runs(results: Results) -> str:
    return _runs(results["runs"]) if "runs" in results else NOTHING


def _named(part: str) -> str:
    _, _, rest = part.partition("-")
    shape, _, rank = rest.rpartition("-")
    return f"{NAMES[shape]}, r {rank}"


AXES = {"rank": (1, 1, 3), "sites": (1, 1, 1), "tokens": (1, 1, 0)}
"""What an axis is -> how a step, the bytes that it keeps and a rank change have to grow: as which power of it."""
NOISE = 0.1
"""By how much a measured power may be above that."""


def _scaling(result: dict[str, Any]) -> str:
    [axis] = AXES.keys() & result["rows"][0].keys()
    rows = []
    for row in result["rows"]:
        ratios = [f"{row[key][1]:.3f}" for key in ("over limit", "search over lora")]
        kept, grown = row["kept"] / row["kept by limit"], (row["kept"] - row["kept by limit"]) / 1e6
        change = f"{1000 * row['seconds']['change']:.1f} ms, {row['change over step'][1]:.3f}"
        rows.append([f"{row[axis]:,}", *ratios, f"{kept:.3f}", f"{grown:.1f} MB", change])
    titles = ["LoRA ÷ limit", "SimplexLoRA in its search ÷ LoRA", "saved ÷ limit", "saved above it"]
    return table([axis, *titles, "a rank change, ÷ step"], rows) + f"\n\n{_growth(axis, result['rows'])}"


def _growth(axis: str, rows: list[dict[str, Any]]) -> str:
    """The powers of the axis with which each grows between the last two points."""
    if len(rows) < 2:
        return "One point alone has no growth."
    before, last = rows[-2:]

    def power(value: Callable[[dict[str, Any]], float]) -> float:
        return math.log(value(last) / value(before)) / math.log(last[axis] / before[axis])

    powers = [
        power(lambda row: row["seconds"]["lora"]),
        power(lambda row: row["kept"] - row["kept by limit"]),
        power(lambda row: row["seconds"]["change"]),
    ]
    named = zip(("a step", "what it saves above the limit", "a rank change"), powers, AXES[axis], strict=True)
    shown = ", ".join(
        f"{name} grows as {axis}^{got:.2f} (at most {most}{': **more**' if got > most + NOISE else ''})"
        for name, got, most in named
    )
    return f"Between the last two points, {shown}."


def scaling(results: Results) -> str:
    there = [results[f"scaling-{axis}"] for axis in AXES if f"scaling-{axis}" in results]
    drawn = ["![ratios by rank, sites and tokens](pictures/growth.svg)"] if len(there) == len(AXES) else []
    return "\n\n".join([*drawn, *map(_scaling, there)]) or NOTHING


def _sft(result: dict[str, Any]) -> str:
    theirs = result["rows"][-1]["losses"]
    rows = []
    for row in result["rows"]:
        low, middle, high = row["tokens a second"]
        off = max(abs(a - b) for a, b in zip(row["losses"], theirs, strict=True))
        speed = f"{middle:.0f} ({low:.0f}–{high:.0f})"
        rows.append([row["program"], speed, ratio(row["over TRL"]), f"{row['peak'] / 2**30:.2f} GiB", f"{off:.0e}"])
    name = f"{result['model']}, TRL {result['trl']}"
    return table([name, "tokens/s", "time ÷ TRL's", "growth in training", "losses differ by at most"], rows)


def sft(results: Results) -> str:
    return _sft(results["sft"]) if "sft" in results else NOTHING


def _together(result: dict[str, Any]) -> str:
    rows = [
        [str(row["runs"]), f"{row['tokens']:,}", *(ratio(row[f"over {other}"]) for other in ("fast", "peft")),
         f"{row['gradients differ by']:.0e}"]
        for row in result["rows"]
    ]  # fmt: skip
    return table(["runs", "tokens of each", "÷ one by one, fast", "÷ one by one, PEFT", "gradients differ by"], rows)


WORTH = 1.5
"""The gain from which several runs in one forward pass would be worth a feature."""


def together(results: Results) -> str:
    there = {shape: results[f"together-{shape}"] for shape in ("bert", "llama") if f"together-{shape}" in results}
    if not there:
        return NOTHING
    many = [row for result in there.values() for row in result["rows"] if row["tokens"] >= 512]
    gain = max((1 / row["over fast"][1] for row in many), default=math.nan)
    said = (
        f"With 512 tokens or more of each run the largest gain ({', '.join(NAMES[shape] for shape in there)}) is "
        f"{gain:.2f} times; {WORTH} would be worth a feature."
    )
    tables = (f"{NAMES[shape]}:\n\n{_together(result)}" for shape, result in there.items())
    return "\n\n".join([*tables, said])


RUNS = {"one": "one process for all", "forked": "a sweep", "fresh": "a fresh process for each"}


def _runs(result: dict[str, Any]) -> str:
    rows = [
        [RUNS[row["arm"]], *(ratio(row[key]) for key in ("over one", "cores over one")), f"{row['seconds']} s"]
        for row in result["rows"]
    ]
    return table(["eight runs of 20 steps", "time ÷ one process", "time of the cores ÷ it", "together"], rows)


SECTIONS = {
    "runs": _runs,
    "steps": _steps,
    "profile": _profile,
    "memory": _memory,
    "changes": _changes,
    "error": _error,
    "help": _help,
    "scaling": _scaling,
    "sft": _sft,
    "together": _together,
}


# --- the goals


def _at_most(value: list[float] | float, goal: float, shown: str = "") -> Cell:
    middle = value if isinstance(value, float) else value[1]
    return shown or (f"{middle:.3f}" if isinstance(value, float) else ratio(value)), middle <= goal


def _step(arms: str | Callable[[dict[str, Any]], list[str]], rank: int, key: str, goal: float) -> Any:
    """The cell of a shape: the step of an arm, or of the slowest of several."""

    def cell(results: Results, shape: str) -> Cell:
        result = results.get(f"steps-{shape}-{rank}")
        if result is None:
            return "", None
        found = _rows(result, key)
        names = [arms] if isinstance(arms, str) else arms(found)
        name = max(names, key=lambda name: found[name][1])
        shown = ratio(found[name]) + ("" if isinstance(arms, str) else f", {name}")
        return _at_most(found[name], goal, shown)

    return cell, f"steps-{{}}-{rank}"


def _kept(name: str, goals: dict[str, float]) -> Any:
    def cell(results: Results, shape: str) -> Cell:
        result = results.get(f"memory-{shape}-8")
        found = {} if result is None else _rows(result, "kept over limit")
        return _at_most(found[name], goals[shape]) if name in found else ("", None)

    return cell, "memory-{}-8"


def _one(part: str, value: Callable[[dict[str, Any], str], tuple[float, str] | None], goal: float) -> Any:
    def cell(results: Results, shape: str) -> Cell:
        found = value(results[part], shape) if part in results else None
        return ("", None) if found is None else _at_most(found[0], goal, found[1])

    return cell, part


def searches(found: dict[str, Any]) -> list[str]:
    """The arms of methods whose layers are PEFT's LoRA; AdaLoRA has other ones, and a row of its own."""
    return [name for name in found if not name.startswith(("PEFT", "full", "lora", "dora", "adalora"))]


def _share(result: dict[str, Any], shape: str) -> tuple[float, str] | None:
    [share] = [row["share"][1] for row in result["rows"] if row["shape"] == shape]
    return share, f"{share:.1e}"


def _worst_error(result: dict[str, Any], shape: str) -> tuple[float, str] | None:
    worst = max(row["above"] for row in result["rows"])
    return (worst, f"{worst:.1e}") if shape == "bert" else None


def _forked(result: dict[str, Any], shape: str) -> tuple[float, str] | None:
    [found] = [row["over one"] for row in result["rows"] if row["arm"] == "forked"]
    return (found[1], ratio(found)) if shape == "bert" else None


def _seconds(result: dict[str, Any], shape: str) -> tuple[float, str] | None:
    help_, pass_ = (row["seconds"][1] for row in result["rows"])
    return (help_, f"{help_:.3f} s, {help_ / pass_:.1f} × `python -c pass`") if shape == "bert" else None


LEAN = {"bert": 1.22, "llama": 1.05}
GOALS: list[tuple[str, str, Any]] = [
    ("LoRA's step ÷ limit, r 8", "≤ 1.10", _step("lora", 8, "over limit", 1.10)),
    ("LoRA's step ÷ limit, r 32", "≤ 1.03", _step("lora", 32, "over limit", 1.03)),
    ("the slowest search ÷ limit, r 8", "≤ 1.10", _step(searches, 8, "over limit", 1.10)),
    ("the slowest search ÷ limit, r 32", "≤ 1.03", _step(searches, 32, "over limit", 1.03)),
    ("AdaLoRA's search ÷ limit, r 8", "≤ 1.10", _step("adalora", 8, "over limit", 1.10)),
    ("LoRA-FA's step ÷ limit, r 8", "≤ 1.06", _step("lora-fa", 8, "over limit", 1.06)),
    ("SimplexLoRA's step in its search ÷ LoRA's", "≤ 1.01", _step("simplex-lora", 8, "over lora", 1.01)),
    ("SoRA's step in its search ÷ LoRA's", "≤ 1.01", _step("sora", 8, "over lora", 1.01)),
    ("LoRA with half the sites empty, half at r 4 ÷ r 8", "≤ 0.93", _step("lora, shrunk", 8, "over lora", 0.93)),
    ("activations ÷ limit, `activation_memory: lean`", "≤ 1.22, ≤ 1.05", _kept("lora, lean", LEAN)),
    ("activations ÷ limit, LoRA-FA", "≤ 1.02", _kept("lora-fa", {"bert": 1.02, "llama": 1.02})),
    ("three rank changes, share of 1,000 steps", "≤ 1e-4", _one("changes", _share, 1e-4)),
    ("error of a resize above the smallest possible", "≤ 1e-8", _one("error", _worst_error, 1e-8)),
    ("eight short runs of a sweep ÷ one process for all", "≤ 1.3", _one("runs", _forked, 1.3)),
    ("`--help`", "≤ 0.2 s", _one("help", _seconds, 0.2)),
]  # fmt: skip
"""What, the goal, and the cell of a shape with the part that measures it."""


def goals(results: Results) -> str:
    rows = []
    for what, goal, (cell, part) in GOALS:
        cells = [cell(results, shape) for shape in ("bert", "llama")]
        met = [good for _, good in cells if good is not None]
        parts = dict.fromkeys(part.format(shape) for shape in ("bert", "llama"))
        rows.append([what, goal, *(shown or "–" for shown, _ in cells), _verdict(met), f"`{' '.join(parts)}`"])
    return table(["", "goal", NAMES["bert"], NAMES["llama"], "reached", "part"], rows)


def _verdict(met: list[bool]) -> str:
    return "not measured" if not met else "yes" if all(met) else "**no**" if not any(met) else "**one of two**"


def every_step(results: Results) -> str:
    columns = [(shape, rank) for shape in NAMES for rank in (8, 32, 64) if f"steps-{shape}-{rank}" in results]
    rows: dict[str, list[str]] = {}
    for shape, rank in columns:
        result = results[f"steps-{shape}-{rank}"]
        peft = _rows(result, "over PEFT LoRA")
        for name, quartiles in _rows(result, "over limit").items():
            rows.setdefault(arm(name), []).append(f"{ratio(quartiles)}; {peft[name][1]:.2f}")
    return table(["step ÷ limit; ÷ PEFT LoRA", *(f"{NAMES[shape]}, r {rank}" for shape, rank in columns)],
                 [[name, *cells] for name, cells in rows.items()])  # fmt: skip


def every_memory(results: Results) -> str:
    columns = [(shape, rank) for shape in NAMES for rank in (8, 32, 64) if f"memory-{shape}-{rank}" in results]
    rows: dict[str, list[str]] = {}
    for shape, rank in columns:
        for row in results[f"memory-{shape}-{rank}"]["rows"]:
            cell = f"{row['kept over limit']:.3f}; {row['peak over limit']:.2f}"
            rows.setdefault(arm(row["arm"]), []).append(cell)
    return table(["saved ÷ limit; growth ÷ limit", *(f"{NAMES[shape]}, r {rank}" for shape, rank in columns)],
                 [[name, *cells] for name, cells in rows.items()])  # fmt: skip


def measured_on(results: Results) -> str:
    lines = []
    for name, result in results.items():
        machine = result["machine"]
        versions = ", ".join(f"{package} {machine[package]}" for package in ("torch", "transformers", "peft"))
        threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        how = f"{machine['device']}, {machine['dtype']}, {threads}; {versions}"
        lines.append([f"`{name}`", result["date"], f"{result['tokens']}", f"{result['rounds']}", how])
    return table(["part", "date", "tokens", "rounds", "machine"], lines)


def devices(results: Results) -> str:
    machines = {(result["machine"]["device"], result["machine"]["dtype"]) for result in results.values()}
    on = " and ".join(f"{device} in {dtype}" for device, dtype in sorted(machines))
    no_gpu = all(dtype == "float32" for _, dtype in machines)
    return f"Measured on {on}." + (" No GPU was at hand." if no_gpu else "")


def elsewhere(results: Results) -> str:
    """The goals on other machines, whose results lie beside those of this one (`--json`)."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob(OTHERS))]
    return "\n\n".join(f"{devices(each)}\n\n{goals(each)}" for each in found) or NOTHING


BLOCKS = {
    "goals": goals,
    "devices": devices,
    "elsewhere": elsewhere,
    "steps": every_step,
    "memory": every_memory,
    "profile": profile,
    "scaling": scaling,
    "sft": sft,
    "runs": runs,
    "together": together,
    "measured": measured_on,
}
"""What stands between the marks of the page."""


def written(text: str, results: Results) -> str:
    """The page with the tables of these results."""
    for name, block in BLOCKS.items():
        marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n)(?:(?!<!-- end).)*(<!-- end -->)", re.DOTALL)
        text, count = marks.subn(lambda found, block=block: f"{found[1]}\n{block(results)}\n\n{found[2]}", text)
        assert count == 1, name
    return text


def pictures(results: Results) -> dict[str, Any]:
    """The figure of each file that these results are enough for."""
    both = {
        f"{NAMES[shape]}, r 8": {arm(name): cell for name, cell in _rows(results[part], "over limit").items()}
        for shape in ("bert", "llama")
        if (part := f"steps-{shape}-8") in results
    }
    growing = {axis: results[part]["rows"] for axis in AXES if (part := f"scaling-{axis}") in results}
    found = {}
    if len(both) == 2:
        found["step.svg"] = plots.steps(both, 1.10, "A training step next to the least that it can take")
    if len(growing) == len(AXES):
        found["growth.svg"] = plots.growth(growing, "How a step, what it saves and a rank change grow")
    return found


def write(results: Results) -> None:
    write_whole(PAGE, written(PAGE.read_text(encoding="utf-8"), results))
    for name, figure in pictures(results).items():
        write_whole(DOCS / "pictures" / name, svg(figure))
