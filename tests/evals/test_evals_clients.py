"""What `dualpath eval clients` makes of answers; the clients themselves run in tests/e2e."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from rich.console import Console

from dualpath_sgl.evals.agents.trace import load_sessions
from dualpath_sgl.evals.clients import compare
from dualpath_sgl.evals.clients.aiperf import TURNS, scaled_traces
from dualpath_sgl.evals.clients.cases import CHAT, COMPLETIONS, GENERATE, MESSAGES, Case, generating
from dualpath_sgl.evals.clients.outcome import ClientFailed, Outcome, run_client
from dualpath_sgl.evals.clients.told import ask, differences, problem_told
from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.launch.config.cluster import Mode, load


@pytest.fixture
def server():
    """Answers every request with `content` and `status`."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(self.server.status)
            self.send_header("Content-Length", str(len(self.server.content)))
            self.end_headers()
            self.wfile.write(self.server.content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        http.status = 200
        thread = Thread(target=http.serve_forever, daemon=True)
        thread.start()
        http.url = f"http://127.0.0.1:{http.server_port}"
        yield http
        http.shutdown()


def told(server, path: str, *events: dict, status: int = 200):
    server.status = status
    server.content = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    server.content += b"data: [DONE]\n\n"
    return ask(server.url, Case("a", path, {}))


def choice(index: int = 0, **fields) -> dict:
    return {"id": "x", "choices": [{"index": index} | fields]}


def test_streams_tell_the_same_wherever_their_events_end(server):
    whole = told(server, COMPLETIONS, choice(text="abc"), choice(1, text="x"))
    parts = told(server, COMPLETIONS, choice(text="a"), choice(1, text="x"), choice(text="bc"))
    assert whole == parts
    other = told(server, COMPLETIONS, choice(text="ab"), choice(1, text="x"))
    assert [*differences(whole.what, other.what)] == [".choice 0.text: 'abc' is 'ab'"]


def test_a_chats_deltas_and_log_probabilities_are_joined(server):
    def delta(text: str, probability: float) -> dict:
        return choice(
            delta={"content": text}, logprobs={"content": [{"token": text, "logprob": probability}]}
        )

    joined = told(server, CHAT, choice(delta={"role": "assistant"}), delta("a", -1.0), delta("b", -2.0)).what
    assert joined["choice 0"]["delta"] == {"role": "assistant", "content": "ab"}
    assert [one["token"] for one in joined["choice 0"]["logprobs"]["content"]] == ["a", "b"]


def test_a_messages_blocks_grow(server):
    def grow(text: str) -> dict:
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}

    begun = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    message = told(server, MESSAGES, begun, grow("a"), grow("b"), {"type": "message_stop"})
    assert message.what["blocks"][0]["text"] == "ab"


def test_times_and_identifiers_do_not_count_and_log_probabilities_nearly(server):
    one = told(server, GENERATE, {"text": "a", "meta_info": {"id": "1", "e2e_latency": 1.0, "p": -2.0}}).what
    two = told(
        server, GENERATE, {"text": "a", "meta_info": {"id": "2", "e2e_latency": 9.0, "p": -2.0005}}
    ).what
    far = told(server, GENERATE, {"text": "a", "meta_info": {"id": "2", "p": -2.5}}).what
    assert not [*differences(one, two)]
    assert [*differences(one, far)]


def test_errors_are_found_in_every_form(server):
    assert problem_told(told(server, CHAT, {"error": {"message": "no"}})) == "no"
    server.status, server.content = 400, b'{"error": {"message": "wrong"}}'
    assert problem_told(ask(server.url, Case("a", CHAT, {}))) == "wrong"
    server.status, server.content = 404, b"nothing here"
    assert problem_told(ask(server.url, Case("a", CHAT, {}))) == "nothing here"
    assert problem_told(told(server, CHAT, choice(delta={}))) is None
    server.status, server.content = 200, b"data: {'error': 'as the Rust router writes it'}\n\n"
    assert "Rust router" in problem_told(ask(server.url, Case("a", COMPLETIONS, {})))


def test_every_case_has_a_name_of_its_own():
    names = [case.name for case in generating()]
    assert len(set(names)) == len(names) > 200


def test_a_client_that_fails_or_differs_is_told_with_the_reason(tmp_path):
    right = Outcome(2, {"a": "x", "b": "y"})
    rows = [
        compare._compared("c", "rust", right, Outcome(2, {"a": "x", "b": "y"})),
        compare._compared("c", "placing", right, Outcome(2, {"a": "x", "b": "z"})),
        compare._compared("c", "placing", right, Outcome(0, {}, "exit status 1: | broken\npipe")),
        compare._compared("c", "placing", Outcome(3, {}), Outcome(3, {})),
    ]
    compare.write(rows, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [set(row) for row in summary] == [{"client", "router", "ok", "requests", "tokens_equal"}] * 4
    assert [(row["ok"], row["tokens_equal"]) for row in summary] == [
        (True, True),
        (True, False),
        (False, None),
        (True, None),
    ]
    report = (tmp_path / "report.md").read_text()
    assert "1 of 2 differ, the first: b" in report and "\\| broken pipe" in report


def test_a_client_that_ends_badly_says_how(tmp_path):
    with pytest.raises(ClientFailed, match="exit status 3: told"):
        run_client(["sh", "-c", "echo told >&2; exit 3"], tmp_path, "log")
    assert run_client(["sh", "-c", 'echo "$no_proxy"'], tmp_path, "log").strip() == "*"


def test_the_traces_for_aiperf_keep_what_requests_share(tmp_path):
    sessions = load_sessions(scaled_traces(tmp_path / "traces"))
    assert len(sessions) == 2
    for session in sessions:
        assert len(session.requests) == TURNS
        assert max(request.prompt_tokens for request in session.requests) < 4000


def test_a_wrong_name_folder_or_cluster_is_refused(tmp_path):
    with pytest.raises(EvalError, match="no client 'curl'; choose from a, b"):
        compare.chosen({"a": None, "b": None}, "a,curl")
    assert list(compare.chosen({"a": None, "b": None}, "b")) == ["b"]
    (tmp_path / "mine").write_text("")
    with pytest.raises(EvalError, match="holds mine: name another folder"):
        compare.fresh(tmp_path)
    earlier = tmp_path / "earlier"
    (earlier / "single-server").mkdir(parents=True)
    assert list(compare.fresh(earlier).iterdir()) == []
    config = load(compare.Path("launch/clusters/cpu-1p1d.yaml")).model_copy(update={"mode": Mode.BASIC})
    with pytest.raises(EvalError, match="mode is basic: it has no placing router"):
        compare.compare(config, {}, tmp_path, Console())
