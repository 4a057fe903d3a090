"""Every way to load stored KV on the GPUs at hand, side by side on one machine in one run.

    python -m dualpath_sgl.evals.gpu.grid --out runs/grid --storage 8gbit --transfer nixl

One prefill and one decode engine of an 8B-sized model with dummy weights, prompts of 32,768 tokens that the
store holds.  Each mode gets a cluster of its own:

    basic           upstream: the prefill engine reads
    both            upstream: both engines read all of it
    decode-side     DualPath's default policy; `decode-side:decode` names another one
    relay:N         N relays, each with a link to the store of its own

and each cluster these loads, all engines' own caches emptied before each:

    lone            one prompt
    burst           several at once
    burst beside    the same while 16 requests decode: what that costs their tokens

Answers are compared with the first that the run got for the same prompts.  `--out` gets logs and
`grid.json`; `--into` adds the records to a file, in the place of older ones of the same cell.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from dualpath_sgl.evals.agents.sessions import wait_until_persisted
from dualpath_sgl.evals.gpu.streams import TokenTimes, beside
from dualpath_sgl.evals.load.client import Burst, send
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, bits_per_s
from dualpath_sgl.launch.setup.tiny_model import TinyModel, build
from dualpath_sgl.launch.supervision.cluster import Cluster

TOKEN_VALUES = 1000
EIGHT_B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
"""Qwen3-8B's: 147,456 bytes of KV a token."""
ENGINE_FLAGS = (
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    "--mem-fraction-static=0.8",
    "--load-format=dummy",
    "--cuda-graph-max-bs-decode=32",
)
PATIENCE = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "300"}
KEY = ("storage_gbit", "transfer", "load", "mode")


@dataclass(frozen=True)
class Cell:
    """One record of the grid."""

    storage_gbit: float | None
    """Rate at which an engine or a relay reads the store; None: as fast as it goes."""
    transfer: str
    """SGLang's transport of KV from prefill to decode engine."""
    load: str
    mode: str
    jct_s: list[float]
    """Sending the first prompt to the end of the last answer, per repetition."""
    ttft_s: list[float]
    """Median over the prompts, per repetition."""
    limit_s: float | None
    """The prompts' bytes over the links that may read them."""
    cached_tokens: list[int]
    """Not computed, of all prompts of a repetition."""
    tokens_equal: bool
    tpot_ms: dict[str, float] | None = None
    """Times per output token of the requests beside."""
    device: str = ""


@dataclass(frozen=True)
class Plan:
    storage: str | None
    transfer: str
    tokens: int
    burst: int
    repetitions: int
    streams: int
    flags: tuple[str, ...]
    env: dict[str, str]
    host_pool_gb: int

    def prompts(self) -> list[list[int]]:
        return [_prompt(self.tokens, number) for number in range(self.burst)]


def eight_b(directory: Path) -> Path:
    """A model directory with the dimensions of an 8B model and no weights."""
    if not directory.exists():
        shutil.copytree(build(TinyModel(layers=1, hidden=64, heads=2, kv_heads=2, head_dim=32)), directory)
        for weights in directory.glob("*.safetensors*"):
            weights.unlink()
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | EIGHT_B, indent=1))
    return directory


def description(plan: Plan, mode: str, model: Path) -> ClusterConfig:
    """The cluster of a mode.  Raises pydantic.ValidationError."""
    name, _, detail = mode.partition(":")
    group = {
        "count": 1,
        "host_pool": {"size_gb": plan.host_pool_gb},
        "extra_args": [
            *ENGINE_FLAGS,
            f"--disaggregation-transfer-backend={plan.transfer}",
            *plan.flags,
        ],
        "env": {**PATIENCE, **plan.env},
    }
    return ClusterConfig.model_validate(
        {
            "name": "grid",
            "device": "cuda",
            "mode": name,
            "model": {"kind": "directory", "path": str(model)},
            "page_size": 64,
            "store": {
                "segment_bytes": 3 * plan.burst * plan.tokens * 147456 // 2,
                **({"read_rate": plan.storage} if plan.storage else {}),
            },
            "scheduler": {"policy": detail or "split"} if name == Mode.DECODE_SIDE else {},
            **({"relays": {"count": int(detail or 1)}} if name == "relay" else {}),
            "prefill": group,
            "decode": group,
            "tracing": {"enabled": False},
        }
    )


def links(mode: str) -> int:
    """How many links to the store may read one prompt."""
    name, _, detail = mode.partition(":")
    if name == "relay":
        return 1 + int(detail or 1)
    return 2 if name == Mode.DECODE_SIDE and detail in ("", "split") else 1


class Grid:
    """Records, on disk after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def put(self, record: dict[str, Any]) -> None:
        """In the place of an older record of the same cell."""
        same = [record[name] for name in KEY]
        self.records = [one for one in self.records if [one[name] for name in KEY] != same]
        self.records.append(record)
        lines = ",\n ".join(json.dumps(one) for one in self.records)
        self._path.write_text(f"[{lines}]\n")


class Meter:
    """Measures one mode after the other."""

    def __init__(self, plan: Plan, device: str, grids: list[Grid]) -> None:
        self._plan = plan
        self._device = device
        self._grids = grids
        self._expected: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Prompt -> the answer that came first."""
        self._begun_s = time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun_s:6.1f} s  {text}", flush=True)

    def measure(self, mode: str, config: ClusterConfig, run_dir: Path) -> None:
        """Raises start-up errors and EvalError."""
        cluster = Cluster(config, run_dir)
        cluster.start(self.say)
        prompts = self._plan.prompts()
        with cluster:
            for prompt in prompts:
                send(cluster.url, [prompt])
            wait_until_persisted(cluster)
            cluster.flush_caches()
            send(cluster.url, prompts[:1])  # Connects.
            for load, of_load in (("lone", prompts[:1]), ("burst", prompts)):
                bursts = [self._load(cluster, of_load) for _ in range(self._plan.repetitions)]
                self._put(mode, load, of_load, bursts, cluster)
            cluster.flush_caches()
            burst, times = beside(cluster.url, self._plan.streams, lambda: send(cluster.url, prompts))
            self._put(mode, "burst beside", prompts, [burst], cluster, times)

    def _load(self, cluster: Cluster, prompts: list[list[int]]) -> Burst:
        cluster.flush_caches()
        return send(cluster.url, prompts)

    def _are_equal(self, prompts: list[list[int]], burst: Burst) -> bool:
        return all(
            self._expected.setdefault(tuple(prompt), answer.tokens) == answer.tokens
            for prompt, answer in zip(prompts, burst.answers, strict=True)
        )

    def _put(
        self,
        mode: str,
        load: str,
        prompts: list[list[int]],
        bursts: list[Burst],
        cluster: Cluster,
        times: TokenTimes | None = None,
    ) -> None:
        rate = bits_per_s(self._plan.storage) if self._plan.storage else None
        total = sum(len(prompt) for prompt in prompts) * cluster.kv_bytes_per_token
        cell = Cell(
            storage_gbit=rate / 1e9 if rate else None,
            transfer=self._plan.transfer,
            load=load,
            mode=mode,
            jct_s=[round(burst.job_s, 3) for burst in bursts],
            ttft_s=[round(median(answer.ttft_s for answer in burst.answers), 3) for burst in bursts],
            limit_s=round(8 * total / rate / links(mode), 3) if rate else None,
            cached_tokens=[sum(answer.cached_tokens for answer in burst.answers) for burst in bursts],
            tokens_equal=all(self._are_equal(prompts, burst) for burst in bursts),
            tpot_ms=times._asdict() if times else None,
            device=self._device,
        )
        for grid in self._grids:
            grid.put(asdict(cell))
        self.say(json.dumps(asdict(cell)))


def _prompt(tokens: int, number: int) -> list[int]:
    rng = random.Random(f"grid/{tokens}/{number}")
    return [rng.randrange(TOKEN_VALUES) for _ in range(tokens)]


def _device() -> str:
    import torch

    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"


def main(
    out: Annotated[Path, typer.Option("--out", help="Directory of logs and `grid.json`.")],
    into: Annotated[
        Path | None, typer.Option("--into", help="A grid file that gets the records, too.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Rate of each link to the store, such as 8gbit; none: not limited.")
    ] = None,
    transfer: Annotated[
        str, typer.Option(help="SGLang's transfer backend: mooncake_tcp, nixl, ...")
    ] = "nixl",
    modes: Annotated[str, typer.Option(help="Comma-separated.")] = "basic,both,decode-side,relay:1,relay:2",
    tokens: Annotated[int, typer.Option(min=64, help="Length of each prompt.")] = 32768,
    burst: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 4,
    repetitions: Annotated[int, typer.Option(min=1, help="Of each load.")] = 2,
    streams: Annotated[int, typer.Option(min=1, help="Requests that decode beside.")] = 16,
    host_pool_gb: Annotated[int, typer.Option(min=1, help="Host memory of each engine.")] = 45,
    flag: Annotated[
        list[str] | None, typer.Option(help="One more flag for every engine, such as --flag=--tp-size=2.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for every engine.")] = None,
) -> None:
    """Time loads in every mode and compare their answers."""
    plan = Plan(
        storage,
        transfer,
        tokens,
        burst,
        repetitions,
        streams,
        tuple(flag or ()),
        dict(one.split("=", 1) for one in env or ()),
        host_pool_gb,
    )
    out.mkdir(parents=True, exist_ok=True)
    grids = [Grid(path) for path in (out / "grid.json", into) if path is not None]
    meter = Meter(plan, _device(), grids)
    model = eight_b(out.resolve() / "model")
    configs = {mode: description(plan, mode, model) for mode in modes.split(",")}
    failed = []
    for mode, config in configs.items():
        meter.say(f"mode {mode}")
        try:
            meter.measure(mode, config, out / mode.replace(":", "-"))
        except Exception as error:  # The other modes' cells are worth having all the same.
            failed.append(mode)
            meter.say(f"mode {mode} failed: {type(error).__name__}: {error}")
    unequal = [one for one in grids[0].records if not one["tokens_equal"]]
    for one in unequal:
        print(f"answers differ: {one['mode']}, {one['load']}")
    if failed or unequal:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
