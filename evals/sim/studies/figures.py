"""`results/sim-paper/summary.json`: the paper's figure, the simulated one, and how far apart they are."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

TOLERANCE = 0.10
PAIR_TOLERANCE = 0.03
PAIR = "equal_snic_"
"""Names of pairs of clusters with equally many storage links begin so; `paper` is 1."""
BY_CONSTRUCTION = {
    "snic_max_over_mean_round_robin": "half of the bytes over two links, half over four",
    "equal_snic_basic_1p1d_1p2d": "Basic uses no decode link",
    "scale_jct_large_over_unit": "the same unit, with every load known",
    "online_capacity_mean": "the mean of the two others",
}
"""Figures that say little about the model, and why."""


class Figure(BaseModel):
    """One row of the file, which is a list of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    paper: float
    simulated: float
    relative_error: float
    """simulated / paper - 1."""

    @classmethod
    def of(cls, name: str, paper: float, simulated: float) -> Figure:
        return cls(name=name, paper=paper, simulated=simulated, relative_error=simulated / paper - 1)

    @property
    def tolerance(self) -> float:
        return PAIR_TOLERANCE if self.name.startswith(PAIR) else TOLERANCE

    @property
    def is_met(self) -> bool:
        return abs(self.relative_error) <= self.tolerance


_figures = TypeAdapter(list[Figure])


def write(figures: list[Figure], folder: Path) -> Path:
    """Makes `folder`; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "summary.json"
    path.write_bytes(_figures.dump_json(figures, indent=2) + b"\n")
    return path


def read(path: Path) -> list[Figure]:
    """Raises pydantic.ValidationError."""
    return _figures.validate_json(path.read_bytes())
