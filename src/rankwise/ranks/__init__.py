"""The rank engine: which weights have rank (`sites`), how much each gets (`allocate`), what changes it (`resize`)."""

from rankwise.ranks.allocate import allocate
from rankwise.ranks.plan import RankPlan
from rankwise.ranks.report import RankReport, rank_report
from rankwise.ranks.resize import resize
from rankwise.ranks.sites import Site, ranks, sites

__all__ = ["RankPlan", "RankReport", "Site", "allocate", "rank_report", "ranks", "resize", "sites"]
