"""``aen report``: one self-contained HTML file, and pictures, about one or more training runs.

:mod:`.collect` reads runs and results, :mod:`.figures` draws, :mod:`.tables` and :mod:`.result_tables` fill
tables, :mod:`.features` finds the texts on which features fire, :mod:`.html` writes the page by the templates
beside it, :mod:`.browser` takes pictures of it with a Chromium that is there.
"""

from aen_lightning.report.activations import collect_activations
from aen_lightning.report.browser import find_browser, take_pictures
from aen_lightning.report.collect import Report, collect
from aen_lightning.report.drawing import Figure
from aen_lightning.report.features import feature_pages
from aen_lightning.report.figures import make_figures
from aen_lightning.report.html import render_report
from aen_lightning.report.trained import TrainedSAE
from aen_lightning.report.vocabulary import load_unembedding, token_texts

__all__ = [
    "Figure",
    "Report",
    "TrainedSAE",
    "collect",
    "collect_activations",
    "feature_pages",
    "find_browser",
    "load_unembedding",
    "make_figures",
    "render_report",
    "take_pictures",
    "token_texts",
]
