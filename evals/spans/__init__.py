"""Recorded traces.

otlp.py       lines of OTLP JSON, as the collector writes them
jaeger.py     in the form that Jaeger's UI opens
traces.py     read and checked, one found by its id
requests.py   what a trace says about its request; the list
waterfall.py  one of them in the terminal
notes.py      a span's few attributes that matter, in words
scripts.py    the same as JSON
command.py    `dualpath trace`
"""
