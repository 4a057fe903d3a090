"""What will not work, asked before anything starts.

choice.py      mode auto becomes one that runs
doctor.py      `dualpath doctor`: machine, cluster file, engine flags
flag_check.py  one engine's flags, as SGLang resolves them
"""
