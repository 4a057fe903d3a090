"""AIPerf: synthetic prompts, and agent traces in the form that its `weka_trace` loader reads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from dualpath_sgl.evals.agents.trace import SHIPPED, load_sessions
from dualpath_sgl.evals.clients.outcome import ClientFailed, Outcome, run_client

SESSIONS = 2
TURNS = 4
SCALE = 16
"""Real contexts are this many times longer."""
ANSWER_TOKENS = 6
FORMS = {
    "aiperf weka_trace": ("--endpoint-type=chat", "--streaming"),
    "aiperf messages": ("--endpoint-type=messages", "--streaming"),
}


def aiperf(form: str, programs: Path, model: Path, url: str, folder: Path) -> Outcome:
    """`programs`: the environment's; `model`: the served model's folder, for its tokenizer."""
    if form == "aiperf weka_trace":
        workload = ["--custom-dataset-type=weka_trace", f"--input-file={scaled_traces(folder / 'traces')}"]
        workload.append("--ignore-trace-delays")
    else:
        workload = ["--isl=120", f"--osl={ANSWER_TOKENS}", "--request-count=6", "--num-dataset-entries=6"]
    # The messages' form has no such field.
    greedy = ["--extra-inputs", "temperature:0"]
    greedy += [] if form == "aiperf messages" else ["--extra-inputs", "ignore_eos:true"]
    argv = [
        *(str(programs / "aiperf"), "profile", f"--model={model}", f"--tokenizer={model}", f"--url={url}"),
        *(*FORMS[form], *workload, *greedy, "--session-header=X-Session-Id"),
        *("--concurrency=2", "--workers-max=1", "--random-seed=1", "--ui=none"),
        *(f"--artifact-dir={folder}", "--export-outputs-json"),
    ]
    try:
        run_client(argv, folder, "aiperf.log")
    except ClientFailed as failed:
        return Outcome(0, {}, str(failed))
    summary = json.loads((folder / "profile_export_aiperf.json").read_text())
    records = json.loads((folder / "outputs.json").read_text())["data"]
    errors = int((summary.get("error_request_count") or {}).get("avg", 0))
    problem = f"{errors} requests failed" if errors else "" if records else "no request was answered"
    return Outcome(len(records) + errors, _answers(records), problem)


def _answers(records: list[dict]) -> dict[str, str]:
    """By conversation and turn; AIPerf plays a conversation again where there are few of them."""
    seen: Counter[str] = Counter()
    answers = {}
    for record in sorted(records, key=lambda one: one["request_start_ns"]):
        turn = f"{record['conversation_id']}/{record['turn_index']}"
        answers[f"{turn}#{seen[turn]}"] = record["response_text"]
        seen[turn] += 1
    return answers


def scaled_traces(folder: Path) -> Path:
    """The first requests of some packaged sessions with shorter contexts, as the loader wants them."""
    folder.mkdir()
    for session in load_sessions(SHIPPED / "claude-code-weka")[:SESSIONS]:
        requests = []
        for index, one in enumerate(session.requests[:TURNS]):
            tokens = one.prompt_tokens // SCALE
            blocks = one.hash_ids[: -(-tokens // session.block_size)]
            requests.append(
                {"t": float(index), "type": "s", "model": session.id, "in": tokens, "out": ANSWER_TOKENS}
                | {"hash_ids": list(blocks), "stop": "end_turn", "api_time": 0.1, "think_time": 0.0}
            )
        whole = {
            "id": session.id,
            "models": [session.id],
            "block_size": session.block_size,
            "requests": requests,
        }
        whole |= {"hash_id_scope": "local", "tool_tokens": 0, "system_tokens": 0}
        (folder / f"{session.id}.json").write_text(json.dumps(whole))
    return folder
