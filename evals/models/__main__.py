"""`python -m dualpath_sgl.evals.models [NAME ...]`: tokens of every kind of model, compared with one server's.

    python -m dualpath_sgl.evals.models gqa swa                     # on the CPU
    python -m dualpath_sgl.evals.models --device cuda --one-gpu gdn
    python -m dualpath_sgl.evals.models --device cuda --list

Each proof starts one plain server, then a cluster of one prefill and one decode engine with a relay.  With a
torch older than SGLang pins, add `--env SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK=1
--env SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python`.  The exit status is 1 when a token differs, no byte came
through a relay, or an engine did not start.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Annotated

import typer

from dualpath_sgl.evals.models import on_cpu, on_cuda
from dualpath_sgl.evals.models.proof import Answers, prove
from dualpath_sgl.evals.models.record import keep
from dualpath_sgl.launch.config.cluster import Mode

DEVICES = {"cpu": on_cpu.CASES, "cuda": on_cuda.CASES}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which proofs; none: all.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[Mode, typer.Option(help="Of the cluster.")] = Mode.RELAY,
    out: Annotated[Path, typer.Option(help="Folder of summary.json and of the runs' logs.")] = Path(
        "results/models"
    ),
    one_gpu: Annotated[bool, typer.Option("--one-gpu", help="Put every engine on GPU 0.")] = False,
    flag: Annotated[list[str] | None, typer.Option(help="One more flag for every engine.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for every engine.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Say what there is, and end.")] = False,
) -> None:
    """Compare the tokens of kinds of models with those of one plain server."""
    if device not in DEVICES:
        raise typer.BadParameter(f"{device!r} is none; choose cpu or cuda")
    cases = {case.name: case for case in DEVICES[device]}
    if listed:
        for case in cases.values():
            print(f"{case.name:16} {case.says}")
        return
    if unknown := {*(names or ())} - cases.keys():
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))} on {device}; there are {', '.join(cases)}")
    flags = (*(flag or ()), *(("--base-gpu-id=0",) if one_gpu else ()))
    begun_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun_s:6.1f} s  {text}", flush=True)

    unproven: list[str] = []
    known: dict[str, Answers] = {}
    for name in names or cases:
        run_dir = out / f"{device}-{mode.value}-{name}"
        try:
            record = prove(
                cases[name],
                device,
                mode,
                run_dir,
                known,
                say,
                flags,
                dict(entry.split("=", 1) for entry in env or ()),
            )
        except Exception:
            say(f"{name} failed: {traceback.format_exc()}")
            unproven.append(name)
            continue
        keep(out, record)
        if not record.tokens_equal or (mode is Mode.RELAY and not record.relay_bytes):
            unproven.append(name)
    if unproven:
        say(f"not proven: {', '.join(unproven)}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
