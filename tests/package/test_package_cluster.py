"""A whole cluster out of the installed copy, started as a person starts it."""

import re
import signal

import pytest

from dualpath_sgl.evals.agents.sessions import ANSWER_TOKENS, generate


@pytest.mark.slow
def test_the_installed_copy_starts_a_cluster_that_answers(complete):
    assert complete.run("python", "-m", "dualpath_sgl.cpu_profile.install").returncode == 0
    cluster = complete.site_packages / "dualpath_sgl" / "launch" / "clusters" / "cpu-1p1d.yaml"
    up = complete.start("dualpath", "up", "-c", str(cluster), "--run-dir", "run")
    try:
        said = []
        for line in up.stdout:
            said.append(line)
            if router := re.match(r"router +(http://\S+)", line):
                break
        else:
            raise AssertionError("".join(said))
        assert len(generate(router.group(1), list(range(1, 100)))) == ANSWER_TOKENS
        status = complete.run("dualpath", "status", "--run-dir", "run")
        assert status.returncode == 0 and "decode-0" in status.stdout, status.stderr
    finally:
        up.send_signal(signal.SIGINT)
        rest, _ = up.communicate(timeout=60)
    assert up.returncode == 0, rest
    assert list((complete.root / ".cache" / "dualpath" / "models").glob("tiny-*"))
