"""Off means off: patched SGLang with DualPath disabled is upstream's SGLang."""

from __future__ import annotations

from dualpath_sgl.evals.agents.sessions import TURNS, forget_caches, play_all
from dualpath_sgl.launch.config.cluster import Mode


def test_with_dualpath_off_a_patched_cluster_serves_as_upstream_does(
    config, reference, sessions, one_cluster
):
    cluster = one_cluster.get(config.model_copy(update={"name": "basic", "mode": Mode.BASIC}))
    for turn in range(TURNS):
        forget_caches(cluster)
        play_all(cluster.url, sessions, turn)
    assert "scheduler" not in cluster.processes
    logs = [(cluster.run_dir / "logs" / f"{name}.log").read_text() for name in ("prefill-0", "decode-0")]
    assert {session.name: session.answers for session in sessions} == reference
    assert not any("DualPath" in log for log in logs)
