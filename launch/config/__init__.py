"""What one YAML file says about a cluster.

cluster.py     the file as a pydantic model: every field, its bounds and its default
yaml_file.py   reads it, so that a problem can be told with its line
hosts.py       addresses in it, checked
kubernetes.py  what a rendering for Kubernetes needs
machines.py    hosts, and which engine is on which
transport.py   TCP or RDMA, for each kind of bytes
otlp.py        where a copy of all spans goes
security.py    keys, and what may listen beyond this host
addresses.py   where each part is reached: all on one address, or each on links of its own
"""

from pathlib import Path

CLUSTERS = Path(__file__).resolve().parents[1] / "clusters"
"""The cluster files that come with this package."""
