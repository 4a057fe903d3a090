"""What is simulated: cluster, model and mode, checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.sim.model.hardware import Hardware
from dualpath_sgl.evals.sim.model.models import Model
from dualpath_sgl.evals.sim.model.scheduling import path_of, placement_of

SCHEDULERS = ("policies", "service")


class Mode(NamedTuple):
    """One system of the paper's comparison (section 7)."""

    placement: str
    path: str
    layerwise: bool = True
    oracle: bool = False
    """No storage reads, no copies, no transfers."""
    relay: bool = False
    """Relays on the decode nodes' links help prefill engines to read."""


MODES = {
    "basic": Mode("round_robin", "prefill", layerwise=False),
    "layerwise": Mode("round_robin", "prefill"),
    "dual-path": Mode("round_robin", "round_robin"),
    "dualpath": Mode("paper", "shorter_queue"),
    "split": Mode("paper", "split"),
    "relay": Mode("paper", "prefill", relay=True),
    "oracle": Mode("paper", "prefill", oracle=True),
}
"""The paper's Basic; its three ablation steps; this project's split and its relays; the paper's
Oracle."""


@dataclass(frozen=True)
class Setup:
    model: Model
    hardware: Hardware
    prefill_nodes: int
    decode_nodes: int
    mode: Mode
    scheduler: str = "policies"
    """`policies` or `service`, see `scheduling`."""
    seed: int = 1

    def __post_init__(self) -> None:
        """Raises EvalError."""
        placement_of(self.mode.placement, self.seed)
        path_of(self.mode.path)
        for name in ("prefill_nodes", "decode_nodes"):
            if getattr(self, name) < 1:
                raise EvalError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.scheduler not in SCHEDULERS:
            raise EvalError(f"scheduler {self.scheduler!r} is unknown; choose one of {', '.join(SCHEDULERS)}")
        for role, group in (("prefill", self.prefill_group), ("decode", self.decode_group)):
            if self.kv_bytes(group) <= 0:
                weights = self._weight_bytes(group) / 1e9
                usable = self.hardware.hbm_bytes * self.hardware.hbm_usable / 1e9
                raise EvalError(
                    f"{self.model.name} needs {weights:.1f} GB of weights on each of {group} {role} engines, "
                    f"but {usable:.1f} GB are usable; give more {role} nodes or a smaller model"
                )

    @property
    def gpus(self) -> int:
        return (self.prefill_nodes + self.decode_nodes) * self.hardware.gpus_per_node

    @property
    def prefill_group(self) -> int:
        """Engines that step together."""
        return self._group(self.model.prefill_group_nodes, self.prefill_nodes)

    @property
    def decode_group(self) -> int:
        return self._group(self.model.decode_group_nodes, self.decode_nodes)

    def _group(self, group_nodes: int, nodes: int) -> int:
        return min(group_nodes, nodes) * self.hardware.gpus_per_node or 1

    def _weight_bytes(self, group: int) -> float:
        return self.model.expert_weight_bytes / group + self.model.other_weight_bytes

    def kv_bytes(self, group: int) -> float:
        """GPU memory of one engine for KV, with its weights spread over `group` engines."""
        return self.hardware.hbm_bytes * self.hardware.hbm_usable - self._weight_bytes(group)
