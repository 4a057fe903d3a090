"""Debian's Prometheus with the files in deploy/: its tools find nothing to complain of, and it scrapes a real cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from monitoring_files import PROMETHEUS, ROOT, panels, registries
from prometheus_client import start_http_server

from dualpath_sgl.evals.agents.sessions import TURNS, Session, forget_caches, play_all
from dualpath_sgl.launch.config.cluster import Mode, Relays, Router, RouterKind, load
from dualpath_sgl.launch.plan.targets import TARGETS_FILE
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.supervision.cluster import Cluster
from scheduler_svc.metrics import Metrics

TOOLS = ROOT / ".cache/prometheus/usr/bin"
"""`make test-slow` puts them there."""
WAIT_S = 90.0
Ask = Callable[..., Any]
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "words",
    [
        "promtool check config prometheus.yml",
        "promtool check rules --lint-fatal alerts.yml",
        "promtool test rules alerts_test.yml",
        "amtool check-config alertmanager.yml",
    ],
)
def test_prometheus_s_own_tools_are_content(words):
    tool, *rest = words.split()
    checked = subprocess.run([TOOLS / tool, *rest], cwd=PROMETHEUS, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def eventually(holds: Callable[[], Any], what: str) -> Any:
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            if found := holds():
                return found
        except OSError:  # Prometheus begins
            pass
        assert time.monotonic() < deadline_s, what
        time.sleep(0.5)


@contextmanager
def prometheus(folder: Path, targets: list[dict]) -> Iterator[Ask]:
    """Its API: `ask("query", query=...)`; it scrapes `targets` each second."""
    shutil.copytree(PROMETHEUS, folder, dirs_exist_ok=True)
    (folder / "targets/test.json").write_text(json.dumps(targets))
    config = folder / "prometheus.yml"
    config.write_text(config.read_text().replace("interval: 5s", "interval: 1s").replace("15s", "1s"))
    address = f"127.0.0.1:{FreePorts('127.0.0.1').take()}"
    command = [
        TOOLS / "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--enable-feature=exemplar-storage",
    ]
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log)

    def ask(what: str, **parameters: str) -> Any:
        url = f"http://{address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def up() -> bool:
        found = ask("targets", state="active")["activeTargets"]
        return len(found) == len(targets) and all(one["health"] == "up" for one in found)

    try:
        eventually(up, "every target is up")
        yield ask
    finally:
        running.terminate()
        running.wait()


# -- each part's metrics, and nothing that happens ------------------------------------------------------


@pytest.fixture(scope="module")
def idle(tmp_path_factory) -> Iterator[tuple[Ask, Metrics]]:
    """Prometheus beside one part of every kind, and the scheduler's metrics."""
    scheduler = Metrics()
    targets = []
    with ExitStack() as running:
        for part, registry in registries(scheduler).items():
            server, _ = start_http_server(0, "127.0.0.1", registry)
            running.callback(server.server_close)
            running.callback(server.shutdown)
            labels = {"job": f"dualpath-{part}", "name": part, "cluster": "idle"}
            targets.append({"targets": [f"127.0.0.1:{server.server_port}"], "labels": labels})
        yield running.enter_context(prometheus(tmp_path_factory.mktemp("idle"), targets)), scheduler


@pytest.mark.parametrize("panel", panels())
def test_every_query_of_every_panel_answers_before_anything_has_happened(panel, idle):
    ask, _ = idle
    for text in panels()[panel]:
        query = text.replace("$__rate_interval", "1m").replace("$cluster", "idle")
        eventually(lambda query=query: ask("query", query=query)["result"], f"{panel}: {query}")


def test_prometheus_keeps_the_trace_that_a_bucket_names(idle):
    ask, scheduler = idle
    scheduler._plan_seconds.observe(0.3, trace_id="a" * 32)

    def kept() -> bool:
        now_s = time.time()
        found = ask(
            "query_exemplars",
            query="dualpath_plan_seconds_bucket",
            start=str(now_s - 600),
            end=str(now_s + 60),
        )
        return any(one["labels"] == {"trace_id": "a" * 32} for series in found for one in series["exemplars"])

    eventually(kept, "an exemplar")


# -- a real cluster --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Every part that DualPath has."""
    described = load(ROOT / "tests/e2e/clusters/gqa-1p1d.yaml").model_copy(
        update={
            "name": "watched",
            "mode": Mode.DECODE_SIDE,
            "router": Router(kind=RouterKind.PLACING),
            "relays": Relays(count=1),
        }
    )
    cluster = Cluster(described, tmp_path_factory.mktemp("watched"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def watched(cluster, tmp_path_factory) -> Iterator[Ask]:
    """Turns whose pages are held, forwarded and read, and looks at every part since."""
    targets = json.loads((cluster.run_dir / TARGETS_FILE).read_text())
    with prometheus(tmp_path_factory.mktemp("prometheus"), targets) as ask:
        sessions = [Session(name) for name in ("ada", "bob")]
        for turn in range(TURNS):
            if turn == TURNS - 1:
                forget_caches(cluster)
            play_all(cluster.url, sessions, turn)
        came = 'sum(rate(dualpath_rank_link_bytes_total{cluster="watched"}[1m])) > 0'
        eventually(lambda: ask("query", query=came)["result"], "what the engines read is seen")
        yield ask


@pytest.mark.parametrize("panel", panels())
def test_every_query_of_every_panel_answers_of_a_real_cluster(panel, watched):
    for text in panels()[panel]:
        query = text.replace("$__rate_interval", "1m").replace("$cluster", "watched")
        eventually(lambda query=query: watched("query", query=query)["result"], f"{panel}: {query}")


def test_the_terms_of_the_pages_needed_add_up_in_prometheus(watched):
    query = "sum(dualpath_rank_needed_pages_total) == sum(dualpath_rank_pages_total) > 0"
    eventually(lambda: watched("query", query=query)["result"], query)


def test_a_healthy_cluster_raises_no_alarm_and_one_without_its_scheduler_does(watched, cluster):
    alerts = watched("rules", type="alert")["groups"][0]["rules"]
    assert alerts and {alert["name"] for alert in alerts if alert["state"] != "inactive"} == set()
    cluster.kill("scheduler")

    def raised() -> bool:
        found = watched("rules", type="alert")["groups"][0]["rules"]
        return {"DualPathSchedulerAway", "DualPathTargetDown"} <= {
            alert["name"] for alert in found if alert["state"] != "inactive"
        }

    eventually(raised, "the alerts are pending")
