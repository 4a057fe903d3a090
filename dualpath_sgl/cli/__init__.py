"""The `dualpath` command: patch packages, run a cluster, look at it, evaluate it.

__main__.py  puts together what launch/cli.py and scheduler_svc/keys_command.py offer, and the programs of
lazy.py      evals, which are imported when they are called
"""
