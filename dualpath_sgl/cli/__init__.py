"""The `dualpath` command: patch packages, run a cluster, look at it, evaluate it.

__main__.py             puts together what launch/cli.py, scheduler_svc/keys_command.py and evals/cli.py offer
configuration_page.py   docs/configuration.md, made of the commands and settings
"""
