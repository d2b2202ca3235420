"""The report of a run: `index.html` (one file, no scripts or network), `findings.json`, `report.png`.

Called by evaluate.py. page.py writes, figures.py lays out figures, panels.py draws, overoptimization.py fits.
"""

from instructjax.report.page import write

__all__ = ["write"]
