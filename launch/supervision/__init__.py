"""A cluster while it runs.

readiness.py      what must hold before
supervisor.py     processes: start, watch, disturb, stop
planned.py        those of a plan, in its order
cluster.py        the processes of a cluster
host_part.py      those that one of several hosts has
single_server.py  one plain server, to compare with
comeback.py       when a part that died is started again
engine_watch.py   engines that run but do not answer
exposure.py       what strangers may reach
direct_http.py    connections to the parts, past any proxy
"""
