"""A plan as files, for whoever starts a cluster elsewhere (`dualpath render`).

command.py     the commands
hosts.py       for each host: systemd units, environment files, an nftables table, an installer
kubernetes.py  objects for `kubectl apply -k`
pods.py        the pod of one process
quoting.py     words as systemd reads them
"""
