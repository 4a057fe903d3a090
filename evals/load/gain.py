"""The README's picture: how much sooner bursts end than upstream's, beside what the links allow.

    python -m dualpath_sgl.evals.load.gain docs/images/gain.json docs/images/gain.png

The first file holds figures of measured runs, written by hand after a run; the second one is drawn.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import typer
from pydantic import BaseModel, ConfigDict, Field

matplotlib.use("Agg")

from matplotlib import pyplot as plt

MEASURED, LIMIT, INK, QUIET = "#3b6ea5", "#b3402a", "#222222", "#767676"
TIMES = "\N{MULTIPLICATION SIGN}"
SOURCE = "Description"
"""Text field of the PNG that names the figures it was drawn of."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(_Record):
    """One burst under upstream and under DualPath."""

    setup: str
    device: Literal["cpu", "gpu"]
    """Only a GPU's seconds are shown: a CPU's say nothing about a cluster."""
    basic_s: float = Field(gt=0)
    """JCT of upstream SGLang, seconds."""
    split_s: float = Field(gt=0)
    """JCT of the path policy `split`, seconds."""
    limit: float = Field(ge=1)
    """Storage links that work for `split`, over those for `basic`."""
    date: str
    command: str

    @property
    def gain(self) -> float:
        return self.basic_s / self.split_s


class Gains(_Record):
    what: str
    runs: tuple[Run, ...] = Field(min_length=1)


def fingerprint(figures: bytes) -> str:
    """What a picture says of the figures it was drawn of."""
    return f"figures sha256 {hashlib.sha256(figures).hexdigest()}"


def draw(gains: Gains, out: Path, source: str) -> None:
    """A bar for each run, the limit as a line across it."""
    figure, axes = plt.subplots(figsize=(8.4, 0.62 * len(gains.runs) + 1.35), layout="constrained")
    for place, run in enumerate(gains.runs):
        axes.barh(place, run.gain, height=0.52, color=MEASURED)
        axes.vlines(run.limit, place - 0.4, place + 0.4, color=LIMIT, linewidth=2.5)
        if run.device == "gpu":
            inside = f"{run.basic_s:.1f} s → {run.split_s:.1f} s"
            axes.text(0.05, place, inside, va="center", color="white", fontsize=9.5)
        reached = f"{run.gain:.2f}{TIMES} of {run.limit:g}{TIMES}"
        axes.text(run.limit + 0.05, place, reached, va="center", color=INK, fontsize=10.5, weight="bold")
    axes.axvline(1, color=QUIET, linewidth=1, linestyle=":")
    axes.text(1, -0.62, "upstream SGLang", ha="center", va="bottom", color=QUIET, fontsize=9)
    axes.text(gains.runs[0].limit, -0.62, "limit", ha="center", va="bottom", color=LIMIT, fontsize=9)
    axes.set_yticks(range(len(gains.runs)), [run.setup for run in gains.runs], fontsize=9.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, max(run.limit for run in gains.runs) + 0.75)
    axes.set_xlabel("speed-up: JCT of upstream / JCT of DualPath", color=INK)
    axes.set_title("A burst of prompts whose KV cache is in storage", loc="left", color=INK, pad=16)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.savefig(out, dpi=144, metadata={"Software": None, SOURCE: source})
    plt.close(figure)


def main(
    figures: Annotated[Path, typer.Argument(help="Figures of measured runs (JSON).")],
    picture: Annotated[Path, typer.Argument(help="PNG to write.")],
) -> None:
    """Draw the gain of measured runs with their limits."""
    content = figures.read_bytes()
    draw(Gains.model_validate_json(content), picture, fingerprint(content))


if __name__ == "__main__":
    typer.run(main)
