"""``aen report``: one self-contained HTML file, and pictures, about one or more training runs.

:mod:`.collect` reads run folders, :mod:`.figures` draws, :mod:`.features` finds the texts on which features fire,
:mod:`.html` writes the page, :mod:`.browser` takes pictures of it with a Chromium that is there.
"""

from aen_lightning.report.collect import Report, collect
from aen_lightning.report.drawing import Figure
from aen_lightning.report.features import feature_pages
from aen_lightning.report.figures import make_figures
from aen_lightning.report.html import render_report
from aen_lightning.report.runs import Dictionary

__all__ = [
    "Dictionary",
    "Figure",
    "Report",
    "collect",
    "feature_pages",
    "make_figures",
    "render_report",
]
