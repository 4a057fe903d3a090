"""SGLang's own benchmark clients.

`bench_serving` is part of its package.  `bench_multiturn` is a program of its source repository only
(benchmark/hicache/bench_multiturn.py).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from dualpath_sgl.evals.clients.outcome import ClientFailed, Outcome, run_client

REQUESTS = 6
FORMS = {
    "bench_serving": ("--backend=sglang", "--dataset-name=random-ids", "--tokenize-prompt"),
    "bench_serving completions": ("--backend=sglang-oai", "--dataset-name=random-ids"),
    "bench_serving chat turns": (
        "--backend=sglang-oai-chat",
        "--dataset-name=generated-shared-prefix",
        "--gsp-num-groups=2",
        "--gsp-prompts-per-group=2",
        "--gsp-num-turns=3",
        "--gsp-system-prompt-len=64",
        "--gsp-question-len=32",
        "--gsp-output-len=8",
        "--gsp-ordered",
    ),
}
"""Name -> what makes it different."""


def bench_serving(form: str, model: Path, url: str, folder: Path) -> Outcome:
    """`model`: the served model's folder, for its tokenizer."""
    results = folder / "results.jsonl"
    argv = [
        *(sys.executable, "-m", "sglang.bench_serving"),
        *(f"--base-url={url}", f"--model={model}"),
        *(f"--num-prompts={REQUESTS}", "--random-input-len=200", "--random-output-len=8"),
        *("--random-range-ratio=0.5", "--max-concurrency=3", "--disable-tqdm", "--seed=1"),
        *("--output-details", f"--output-file={results}", *FORMS[form]),
    ]
    try:
        run_client(argv, folder, "bench_serving.log")
    except ClientFailed as failed:
        return Outcome(0, {}, str(failed))
    told = json.loads(results.read_text().splitlines()[-1])
    answers = {str(index): text for index, text in enumerate(told["generated_texts"])}
    failures = [error for error in told.get("errors", ()) if error]
    problem = f"{len(failures)} requests failed: {failures[0][:200]}" if failures else ""
    if not problem and not (told["completed"] == len(answers) > 0 and all(answers.values())):
        problem = f"{told['completed']} of {len(answers)} requests were answered"
    return Outcome(len(answers), answers, problem)


def bench_multiturn(script: Path, model: Path, url: str, folder: Path) -> Outcome:
    """It tells how many requests were answered, not what; the text of each turn is part of the next prompt."""
    clients, rounds = 3, 3
    address = urlsplit(url)
    argv = [
        *(sys.executable, str(script.absolute()), f"--host={address.hostname}", f"--port={address.port}"),
        *(f"--model-path={model}", f"--num-clients={clients}", f"--num-rounds={rounds}", "--max-parallel=2"),
        *("--request-length=96", "--output-length=8", "--request-rate=16", "--disable-auto-run"),
        *("--disable-random-sample", f"--log-file={folder / 'multiturn.jsonl'}"),
    ]
    try:
        said = run_client(argv, folder, "bench_multiturn.log")
    except ClientFailed as failed:
        return Outcome(0, {}, str(failed))
    answered = re.search(r"Total requests: (\d+)", said)
    count = int(answered[1]) if answered else 0
    problem = "" if count == clients * rounds else f"{count} of {clients * rounds} requests were answered"
    return Outcome(clients * rounds, {}, problem)
