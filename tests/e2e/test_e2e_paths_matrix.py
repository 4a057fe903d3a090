"""`dualpath eval matrix` on a real cluster that runs already: tokens, full text, agents that come and think.

Named so that the cluster of the modules around it serves it.
"""

import json
from pathlib import Path

import yaml
from rich.console import Console

from dualpath_sgl.evals.matrix.command import prepare
from dualpath_sgl.evals.matrix.results import finished_cells
from dualpath_sgl.evals.report.page import write_report

CLUSTER = Path(__file__).parent / "clusters" / "gqa-1p1d.yaml"
TASK, RESULT = "mends the parser. " * 20, "It failed. " * 10


def texts(name: str) -> list[dict]:
    """Two requests of a session that share nothing with another name's."""
    begun, done = f"{name} {TASK}", f"{name} {TASK}{RESULT}"
    return [
        {"session_id": name, "timestamp": 0, "input": begun, "output": "I look at it first."},
        {"session_id": name, "timestamp": 300_000, "input": done, "output": "Again."},
    ]


def test_a_running_cluster_is_measured_with_ids_and_with_text(cluster, tmp_path):
    lines = [json.dumps(text) for name in ("one", "two") for text in texts(name)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    file = tmp_path / "experiment.yaml"
    content = {
        "name": "attached",
        "cluster": str(CLUSTER),
        "modes": ["split"],
        "traces": {
            "coding": {"turns": 3, "max_context": 1024},
            "texts": {"format": "lmcache-agent", "path": "texts.jsonl", "max_context": 1024},
        },
        "loads": [
            {"kind": "offline", "agents": 3, "concurrency": 2},
            {"kind": "online", "agents": 3, "agents_per_s": 2.0, "think": 1, "longest_think_s": 0.2},
        ],
        "check_tokens": False,
        "sample_s": 0.2,
    }
    file.write_text(yaml.safe_dump(content))
    prepared = prepare(file, tmp_path / "out", cluster.url, cluster.run_dir, Console(quiet=True))
    assert prepared.run() == []
    cells = {cell.name.removeprefix("1p1d--split--"): cell for cell in finished_cells(prepared.out)}
    assert [len(cell.requests) for cell in cells.values()] == [9, 9, 6, 6]
    for name, cell in cells.items():
        assert sum(cell.paths.values()) == len(cell.requests), name
        assert cell.read_bytes.keys() == {"prefill-0", "decode-0"}
        # Later turns find what earlier ones computed; the text's last page differs by what a chat adds.
        later = [request for request in cell.requests if request.turn]
        assert any(request.cached_tokens for request in later), name
        assert all(request.cached_tokens <= request.theoretical_hit_tokens for request in later), name
    chats = cells["texts--3-agents-2-at-once"].requests
    assert {request.session for request in chats} == {"one", "two", "one#1"}
    assert all(request.prompt_tokens > 100 for request in chats)
    page = write_report(prepared.out).read_text()
    assert "paths none / prefill / decode / split" in page
