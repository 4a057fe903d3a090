"""SGLang's own benchmark client belongs to the environment that `make setup` makes."""

import subprocess
import sys


def test_sglangs_benchmark_client_starts():
    argv = [sys.executable, "-m", "sglang.bench_serving", "--help"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
    assert "--dataset-name" in result.stdout
