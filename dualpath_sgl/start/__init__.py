"""What is settled before an engine serves.

config.py   settings: `DUALPATH_*` environment variables
facts.py    what SGLang knows of an engine, and when it is judged
checks.py   the rules: what will not work, why, and the remedy
dp_rank.py  which data parallel rank this process is
"""
