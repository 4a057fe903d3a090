"""What the load benchmark has found.

cells.py     repeated measurements of one thing
progress.py  what is measured so far, on disk: an interrupted run goes on from there
figures.py   ratios of cells, with target and limit
summary.py   `summary.json`
report.py    tables on the terminal
plot.py      the picture
"""
