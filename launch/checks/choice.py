"""Mode auto of a cluster file becomes the one that its engines can run in: decode-side, else relay.

Engines decide for themselves when they start (`dualpath_sgl/start/verdict.py`).  Here the same is asked
beforehand, because decode engines get other flags in either mode, and relays may have to be started.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dualpath_sgl.launch.checks.flag_check import Judgement, judge
from dualpath_sgl.launch.config.addresses import on_one_host
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, Tiny
from dualpath_sgl.launch.processes.commands import (
    SCHEDULED,
    EngineSpec,
    Ports,
    engine_command,
    engine_environment,
    engine_specs,
)
from dualpath_sgl.launch.setup.patching import State, Tree, stacks
from dualpath_sgl.start.checks import TRANSFERS
from scheduler_svc.wire.protocol import Mode as EngineMode


@dataclass(frozen=True)
class GroupFlags:
    """Engines of one role, as the launcher would start them."""

    role: str
    count: int
    flags: list[str]
    environment: dict[str, str]


def groups(config: ClusterConfig, environment: Mapping[str, str]) -> Iterator[GroupFlags]:
    """Those that DualPath runs in; the mode is chosen."""
    addresses = on_one_host(config.host)
    ports = Ports(*range(20001, 20008))
    free = iter(range(20008, 65536))
    first: dict[str, EngineSpec] = {}
    for engine in engine_specs(config, lambda: next(free)):
        if config.mode in SCHEDULED:
            first.setdefault(engine.role, engine)
    for role, engine in first.items():
        # `python -m dualpath_sgl.launch.engine` is not judged, its flags are.
        flags = engine_command(config, addresses, engine, ports)[3:]
        variables = engine_environment(config, addresses, engine, ports, environment)
        yield GroupFlags(role, engine.group.count, flags, variables)


def choose(config: ClusterConfig, environment: Mapping[str, str]) -> tuple[ClusterConfig, str]:
    """With another mode than auto, and why; takes some ten seconds unless the tiny model has its own flags.

    Raises RuntimeError when SGLang cannot be asked, and PatchError when it is not the SGLang that was tested.
    """
    if config.mode is not Mode.AUTO:
        return config, f"the cluster file says {config.mode}"
    obstacle = _obstacle(config, environment)
    mode = Mode.DECODE_SIDE if obstacle is None else Mode.RELAY
    return config.model_copy(update={"mode": mode}), obstacle or "nothing stands against it"


def _obstacle(config: ClusterConfig, environment: Mapping[str, str]) -> str | None:
    """What stands in the way of decode-side loads."""
    if config.device == "cuda":
        return (
            "SGLang's fastest page layout and I/O on GPUs, page_first and kernel, cannot do decode-side loads"
        )
    if config.prefill.tp_size != config.decode.tp_size:
        return f"tp_size is {config.prefill.tp_size} on prefill engines and {config.decode.tp_size} on decode engines"
    if any(Tree(stack).check().state is not State.APPLIED for stack in stacks("sglang")):
        return "SGLang is not patched; dualpath patch apply does it"
    own_flags = [*config.prefill.extra_args, *config.decode.extra_args]
    if isinstance(config.model, Tiny) and not own_flags and config.transport.backend in TRANSFERS:
        return None  # the launcher's own flags, and a model of plain KV
    decode_side = config.model_copy(update={"mode": Mode.DECODE_SIDE})
    with ThreadPoolExecutor(max_workers=2) as pool:
        asked = [
            pool.submit(judge, group.flags, _undecided(group.environment))
            for group in groups(decode_side, environment)
        ]
        reasons = [reason for answer in asked if (reason := _reason(answer.result())) is not None]
    return reasons[0] if reasons else None


def _undecided(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name != "DUALPATH_MODE"}


def _reason(judgement: Judgement) -> str | None:
    if judgement.mode is None:  # so not at all, but perhaps with the flags of mode relay
        return "; ".join(f"{each.setting} is {each.value}: {each.why}" for each in judgement.refusals)
    return None if judgement.mode == EngineMode.DECODE_SIDE else judgement.because
