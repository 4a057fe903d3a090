"""The `dualpath` command: patch packages, run a cluster, look at it, evaluate it.

__main__.py             puts together what launch/cli.py and scheduler_svc/keys_command.py offer, and the programs
lazy.py                 of evals, which are imported when they are called
configuration_page.py   docs/configuration.md, made of the commands and settings
"""
