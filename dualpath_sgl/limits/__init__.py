"""Measuring aids: a storage link where links cannot be shaped.

read_limit.py     the imagined link
limited_store.py  puts it into SGLang's store client
"""
