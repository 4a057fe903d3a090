"""Two modes as a picture: job completion times with the limit drawn in, and who read how much."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from dualpath_sgl.evals.compare.summary import ModeResult, Summary
from dualpath_sgl.terminal.units import size

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

BAR, LIMIT = "#4878a8", "#c03028"
READERS = {"prefill": "#4878a8", "decode": "#e09040"}
HALF_BAR = 0.3


def draw(summary: Summary, out: Path) -> None:
    """Write a PNG."""
    results = list(summary.modes.values())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), width_ratios=(3, 2))
    _times(left, results)
    _bytes(right, results)
    work = summary.workload
    figure.suptitle(
        f"{work.requests} requests of {work.sessions} agents, an equally slow storage link per engine; "
        f"tokens {'equal' if summary.tokens_equal else 'NOT EQUAL'} to one server's",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def _times(axes: Axes, results: list[ModeResult]) -> None:
    for place, result in enumerate(results):
        axes.bar(place, result.job_s, 2 * HALF_BAR, color=BAR)
        axes.text(place, result.job_s, f"{result.job_s:.1f} s", ha="center", va="bottom", weight="bold")
        if result.storage_limit_s is None:
            continue
        axes.hlines(result.storage_limit_s, place - 1.2 * HALF_BAR, place + 1.2 * HALF_BAR, color=LIMIT, lw=2)
        axes.text(
            place + 1.3 * HALF_BAR,
            result.storage_limit_s,
            f"{result.storage_limit_s:.1f} s",
            color=LIMIT,
            va="center",
        )
    axes.plot([], [], color=LIMIT, lw=2, label="limit: the storage links alone")
    axes.set_xticks(range(len(results)), [_name(result) for result in results])
    axes.set_xlim(-0.6, len(results) - 0.3)
    axes.set_ylim(0, 1.25 * max(result.job_s for result in results))
    axes.set_ylabel("seconds")
    first, last = results[0], results[-1]
    axes.set_title(f"Job completion time: {first.job_s / last.job_s:.2f} times as fast")
    axes.legend(loc="upper right", frameon=False)


def _bytes(axes: Axes, results: list[ModeResult]) -> None:
    for place, result in enumerate(results):
        bottom = 0
        for role, colour in READERS.items():
            read = getattr(result.store_read_bytes, role)
            axes.bar(place, read / 1e6, 2 * HALF_BAR, bottom / 1e6, color=colour)
            if read:
                axes.text(
                    place, (bottom + read / 2) / 1e6, size(read), ha="center", va="center", color="white"
                )
            bottom += read
    for role, colour in READERS.items():
        axes.bar(0, 0, color=colour, label=f"by the {role} engine")
    axes.set_xticks(range(len(results)), [result.mode for result in results])
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.set_ylim(0, 1.35 * max(_read(result) for result in results) / 1e6)
    axes.set_ylabel("MB")
    axes.set_title("Read from the store")
    axes.legend(loc="upper right", frameon=False)


def _read(result: ModeResult) -> int:
    return result.store_read_bytes.prefill + result.store_read_bytes.decode


def _name(result: ModeResult) -> str:
    return (
        f"{result.mode}\n(SGLang as it is)" if result.policy is None else f"{result.mode}\n({result.policy})"
    )
