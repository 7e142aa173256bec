"""The table of ranks."""

import models
import rankwise as rw
from rankwise.ranks import sites


def test_report_counts_what_trains():
    model = models.adapted()
    rw.resize(model, {sites(model)[0].name: 0})
    report = rw.rank_report(model)
    assert report.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "all sites" in str(report) and f'"total": {report.total}' in report.to_json()
