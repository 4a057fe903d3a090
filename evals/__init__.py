"""Agent workloads, replay, baselines and the reading of traces."""
