"""What a reader gets from a folder of runs: pictures, one offline HTML page, and the same table as text.

Nothing here imports torch, so a report of a hundred runs takes no longer than matplotlib needs.
`rankwise.report(runs)` returns the results of the finished runs.
"""

import sys

import rankwise

sys.modules[__name__].__class__ = rankwise.Room
