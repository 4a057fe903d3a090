"""The DualPath global scheduler: a ZeroMQ service that chooses engines and load paths."""
