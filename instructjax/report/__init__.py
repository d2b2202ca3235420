"""The report of a run: `index.html` (one file, without scripts or network access), findings.json and report.png.

Called by stages/evaluate.py. page.py writes the files, figures.py lays out the panels that panels.py draws.
"""

from instructjax.report.page import write

__all__ = ["write"]
