"""A plan as files, for whoever starts a cluster elsewhere (`dualpath render`).

command.py   the command
hosts.py     for each host: systemd units, environment files, an nftables table, an installer
quoting.py   words as systemd reads them
"""
