"""What is settled before an engine serves.

config.py   settings: `DUALPATH_*` environment variables
facts.py    what SGLang knows of an engine, and when it is judged
checks.py   the rules: what stands against a mode, why, and the remedy
verdict.py  which mode is left
dp_rank.py  which data parallel rank this process is
"""
