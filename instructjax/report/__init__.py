"""The report of a run: `index.html` (one file, no scripts, no network), findings.json, report.png.

Called by evaluate.py. page.py writes, figures.py lays out panels.py's drawings.
"""

from instructjax.report.page import write

__all__ = ["write"]
