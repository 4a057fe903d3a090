"""The HTML report of an experiment, drawn from its result folder.

page.py        one file with everything, and the plots beside it
story.py       what the plots say, in sentences and in a table
groups.py      which cells stand beside each other
style.py       colours, light and dark
times.py       job completion times with their limit
links.py       storage links and load paths in time
latency.py     distributions of TTFT, TTST and TPOT
throughput.py  against load and lengths; capacity
sharing.py     who read, and hit rates
page.html.j2: the page's template
"""
