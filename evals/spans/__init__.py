"""Recorded traces.

otlp.py       lines of OTLP JSON, as the collector writes them
jaeger.py     in the form that Jaeger's UI opens
waterfall.py  in the terminal
"""
