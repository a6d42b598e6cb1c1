"""The report of a run: one HTML page and its Markdown twin, from ``summary.json`` alone."""
