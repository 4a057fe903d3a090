"""A cluster while it runs.

readiness.py      what must hold before
supervisor.py     processes: start, watch, disturb, stop
cluster.py        the processes of a cluster
single_server.py  one plain server, to compare with
comeback.py       when a part that died is started again
engine_watch.py   engines that run but do not answer
exposure.py       what strangers may reach
direct_http.py    connections to the parts, past any proxy
"""
