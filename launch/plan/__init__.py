"""A cluster as processes, whatever runs them: this machine, several hosts, Kubernetes.

process.py   one process: how it is started, when it is ready, what it needs
site.py      what a backend knows: where parts are, and on which ports
fixed.py     sites whose ports the description fixes: several hosts, Kubernetes
targets.py   who of it answers Prometheus
whole.py     from a description and a site to all processes, in the order of starting
"""
