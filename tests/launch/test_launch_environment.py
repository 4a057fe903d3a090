"""What of a user's environment reaches a cluster: nothing that changes what its description says."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from dualpath_sgl.launch.config.addresses import on_one_host
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.launch.processes.commands import Ports, engine_environment, engine_specs
from dualpath_sgl.launch.processes.environment import foreign, forget_foreign_tracing, inherited
from dualpath_sgl.launch.processes.ports import FreePorts
from dualpath_sgl.launch.supervision.direct_http import fetch

PORTS = Ports(*range(1, 8))
CONFIG = ClusterConfig.model_validate(
    {
        "name": "t",
        "device": "cpu",
        "mode": "decode-side",
        "decode": {"env": {"SGLANG_X": "asked", "OTEL_BSP_SCHEDULE_DELAY": "1"}},
    }
)
DEAD_PROXY = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "grpc_proxy")


def engine(base: dict[str, str], host: str = "127.0.0.1") -> dict[str, str]:
    """The first prefill engine's environment."""
    spec = engine_specs(CONFIG, lambda: 7)[0]
    return engine_environment(CONFIG, on_one_host(host), spec, PORTS, base)


@pytest.mark.parametrize(
    "name",
    [
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_HEADERS",
        "OTEL_EXPORTER_OTLP_CERTIFICATE",
        "OTEL_EXPORTER_OTLP_COMPRESSION",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
        "OTEL_EXPORTER_OTLP_INSECURE",
        "OTEL_SDK_DISABLED",
        "OTEL_TRACES_SAMPLER",
        "OTEL_TRACES_EXPORTER",
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
        "OTEL_SERVICE_NAME",
        "OTEL_PROPAGATORS",
        "SGLANG_SET_ELSEWHERE",
        "SGLANG_DISAGGREGATION_WAITING_TIMEOUT",
        "MC_FORCE_TCP",
        "MOONCAKE_CONFIG_PATH",
        "DUALPATH_PEER_TIMEOUT_S",
        "PROMETHEUS_MULTIPROC_DIR",
        "WEB_CONCURRENCY",
    ],
)
def test_a_setting_of_another_server_or_tool_stays_outside_and_is_told(name):
    assert name not in engine({name: "x"})
    assert foreign({name: "x", "PATH": "/bin"}) == [name]


@pytest.mark.parametrize(
    "name",
    [
        "PATH",
        "HOME",
        "PYTHONPATH",
        "LD_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
        "NCCL_SOCKET_IFNAME",
        "HF_HOME",
        "OTEL_RESOURCE_ATTRIBUTES",
        *PROXIES,
    ],
)
def test_what_describes_the_machine_or_its_user_gets_in(name):
    assert engine({name: "x"})[name] == "x"
    assert foreign({name: "x"}) == []


def test_what_a_cluster_file_says_of_an_engine_wins():
    decode = engine_specs(CONFIG, lambda: 7)[1]
    found = engine_environment(CONFIG, on_one_host("127.0.0.1"), decode, PORTS, {"SGLANG_X": "exported"})
    assert (found["SGLANG_X"], found["OTEL_BSP_SCHEDULE_DELAY"]) == ("asked", "1")


def test_the_clusters_addresses_are_exempt_from_every_proxy_beside_what_was_exempt_already():
    found = engine({"no_proxy": "a.example, b", "NO_PROXY": "c"}, host="10.0.0.7")
    wanted = {"a.example", "b", "c", "localhost", "127.0.0.1", "::1", "10.0.0.7"}
    for variable in ("no_proxy", "NO_PROXY"):
        assert wanted <= set(found[variable].split(","))
    assert "10.0.0.7" in engine({"no_grpc_proxy": "d"}, host="10.0.0.7")["no_grpc_proxy"].split(",")
    assert "no_grpc_proxy" not in engine({})


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_probes_reach_a_part_past_a_proxy_that_the_environment_names(server, monkeypatch):
    for name in PROXIES:
        monkeypatch.setenv(name, DEAD_PROXY)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(requests.exceptions.ProxyError):
        requests.get(server, timeout=5)
    assert fetch(server, timeout_s=5) == b"here"


def test_sglangs_own_calls_in_a_child_reach_a_part_past_that_proxy(server):
    base = os.environ | dict.fromkeys(PROXIES, DEAD_PROXY)
    base = {name: value for name, value in base.items() if name.lower() != "no_proxy"}
    call = f"import requests; print(requests.get({server!r}, timeout=5).text)"
    argv = [sys.executable, "-c", call]
    environment = inherited(base, ["127.0.0.1"])
    assert subprocess.run(argv, env=environment, capture_output=True, text=True).stdout == "here\n"


def test_decode_engines_know_how_long_prefill_engines_wait_for_them():
    timeout = "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"
    config = CONFIG.model_copy(update={"prefill": CONFIG.prefill.model_copy(update={"env": {timeout: "20"}})})
    decode = engine_specs(config, lambda: 7)[1]
    assert engine_environment(config, on_one_host("127.0.0.1"), decode, PORTS, {})[timeout] == "20"
    assert timeout not in engine_environment(CONFIG, on_one_host("127.0.0.1"), decode, PORTS, {timeout: "1"})


def test_the_spans_of_an_evaluation_do_not_follow_the_users_exporter():
    environment = {"OTEL_SDK_DISABLED": "true", "OTEL_RESOURCE_ATTRIBUTES": "a=b", "SGLANG_X": "1"}
    forget_foreign_tracing(environment)
    assert environment == {"OTEL_RESOURCE_ATTRIBUTES": "a=b", "SGLANG_X": "1"}


def test_spans_in_plain_text_reach_the_collector_past_a_proxy(tmp_path):
    port = FreePorts("127.0.0.1").take()
    spans = tmp_path / "spans.jsonl"
    argv = [
        sys.executable,
        "-m",
        "dualpath_sgl.launch.processes.collector",
        f"--port={port}",
        f"--out={spans}",
    ]
    collector = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert "collector ready" in collector.stdout.readline()
        code = (
            "from scheduler_svc.telemetry.tracing import init_tracing, shutdown\n"
            f"init_tracing('x', 'http://127.0.0.1:{port}').start_span('past the proxy').end()\n"
            "shutdown()\n"
        )
        environment = os.environ | dict.fromkeys(PROXIES, DEAD_PROXY)
        environment = {name: value for name, value in environment.items() if name.lower() != "no_proxy"}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
        assert "past the proxy" in spans.read_text()
    finally:
        collector.terminate()
        collector.wait()
