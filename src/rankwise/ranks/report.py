"""The ranks of an adapter as a table and as JSON."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from io import StringIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from rankwise.ranks.sites import sites


@dataclass(frozen=True)
class RankRow:
    """One site: its name, rank, parameters per unit of rank (`cost`) and total parameters."""

    site: str
    rank: int
    cost: int
    parameters: int


@dataclass(frozen=True)
class RankReport:
    """Rank and parameters of every site. Prints as a table, in a terminal or in a notebook."""

    sites: list[RankRow]

    @property
    def total(self) -> int:
        """Parameters of all adapters together."""
        return sum(row.parameters for row in self.sites)

    def to_json(self) -> str:
        return json.dumps({"sites": [asdict(row) for row in self.sites], "total": self.total}, indent=2)

    def table(self) -> Table:
        table = Table("site", title="ranks")
        for heading in ("rank", "parameters"):
            table.add_column(heading, justify="right")
        for row in self.sites:
            table.add_row(row.site, str(row.rank), f"{row.parameters:,}")
        table.add_section()
        table.add_row("all sites", str(sum(row.rank for row in self.sites)), f"{self.total:,}")
        return table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=100).print(self.table())
        return text.getvalue().rstrip()


def rank_report(model: nn.Module) -> RankReport:
    """Live rank, cost and parameters of every site of `model`, emptied ones included."""
    return RankReport([RankRow(s.name, s.live, s.cost, s.parameters) for s in sites(model)])


def by_kind(ranks: Mapping[str, int]) -> str:
    """Ranks by site, a line for each kind of layer with its rank in every block: 0 where it has none."""
    grid: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        block, kind = re.fullmatch(r"(?:.*?\.(\d+)\.)?(.*)", name).groups()  # type: ignore[union-attr]
        grid.setdefault(kind, {})[int(block or -1)] = rank
    blocks = sorted({block for row in grid.values() for block in row} - {-1})
    wide, high = max(map(len, grid), default=0), len(str(max(ranks.values(), default=0)))
    lines = []
    for kind, row in sorted(grid.items()):
        own = [row[-1]] if -1 in row else [row.get(block, 0) for block in blocks]
        lines.append(f"{kind:<{wide}}  {' '.join(f'{rank:>{high}}' for rank in own)}")
    return "\n".join(lines)
