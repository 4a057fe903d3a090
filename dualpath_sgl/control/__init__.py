"""What engine ranks and relays tell the global scheduler, and hear from it.

link.py            a connection to it that comes back by itself: one thread, one socket, heartbeats
channel.py         an engine rank's: reports out, plans and relays in
relay_channel.py   a relay's
workload.py        how busy this rank is
decode_work.py     what a DE has to do
prefill_work.py    what a PE in relay mode has to do
drain_rate.py      how fast a storage link is, and an engine
real_request.py    which of SGLang's requests count
"""
