"""What a reader gets from a folder of runs: pictures, one offline HTML page, and the same table as text.

Nothing in this room imports torch, so that a report of a hundred runs opens in the time matplotlib needs.
`rankwise.report(runs)` gives what their finished runs say.
"""

import sys

import rankwise

sys.modules[__name__].__class__ = rankwise.Room
