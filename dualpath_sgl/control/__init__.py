"""What an engine rank and the global scheduler tell each other.

channel.py         one thread, one ZeroMQ socket: reports and heartbeats out, plans in
workload.py        how busy this rank is
decode_work.py     what a DE has to do
real_request.py    which of SGLang's requests count
"""
