"""The load benchmark as a picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from dualpath_sgl.evals.load.outcome.summary import LoadSummary

matplotlib.use("Agg")

from matplotlib import pyplot as plt

BURSTS = (
    ("1p1d/basic/burst", 1, "basic"),
    ("1p1d/both/burst", 1, "both"),
    ("1p1d/decode/burst", 1, "decode"),
    ("1p1d/shorter_queue/burst", 2, "shorter_queue"),
    ("1p1d/split/burst", 2, "split"),
    ("1p1d/relay/burst", 2, "relay"),
    ("1p1d/oracle/burst", None, "oracle"),
    ("1p2d/basic/burst", 1, "basic 1P2D"),
    ("1p2d/split/burst", 3, "split 1P2D"),
    ("1p2d/relay/burst", 3, "relay 1P2D"),
    ("2p1d/basic/burst", 2, "basic 2P1D"),
    ("2p1d/split/burst", 3, "split 2P1D"),
    ("2p1d/relay/burst", 3, "relay 2P1D"),
    ("2p2d/basic/burst", 2, "basic 2P2D"),
    ("2p2d/split/burst", 4, "split 2P2D"),
    ("2p2d/relay/burst", 4, "relay 2P2D"),
)
"""Cell, storage links that can work for it (None: it reads nothing), label."""
LONE = (
    ("1p1d/basic/lone", "basic"),
    ("1p1d/prefill/lone", "prefill"),
    ("1p1d/decode/lone", "decode"),
    ("1p1d/split/lone", "split"),
    ("1p1d/relay/lone", "one relay"),
    ("1p2d/relay/lone", "two relays"),
    ("1p1d/oracle/lone", "oracle"),
)


def draw(summary: LoadSummary, out: Path) -> None:
    """JCT of each burst with the time its storage links need at the least, and lone TTFTs."""
    details = summary.details
    setting = details.setting
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 4.8), width_ratios=(5, 2))

    bursts = [entry for entry in BURSTS if entry[0] in details.cells]
    for place, (name, links, _) in enumerate(bursts):
        cell = details.cells[name]
        left.bar(place, cell.job_s, color="#4878a8" if links else "#a0a0a0")
        left.scatter(
            [place] * len(cell.samples), [s.job_s for s in cell.samples], color="black", s=8, zorder=3
        )
        basic = details.cells.get("1p1d/basic/burst")
        if links and basic:
            # Not the prompts' sizes: their last page is always computed, never read.
            link_s = basic.storage_bytes * 8 / setting.storage_bits_per_s / links
            left.hlines(link_s, place - 0.4, place + 0.4, color="#c03028", zorder=4)
    left.plot([], [], color="#c03028", label="storage links alone")
    left.set_xticks(range(len(bursts)), [label for *_, label in bursts], rotation=30, ha="right")
    left.set_ylabel("JCT (s)")
    left.set_title(f"{setting.requests} prompts of {setting.prompt_tokens} stored tokens at once")
    left.legend()

    lone = [entry for entry in LONE if entry[0] in details.cells]
    for place, (name, _) in enumerate(lone):
        right.bar(place, details.cells[name].ttft_s, color="#4878a8")
    right.set_xticks(range(len(lone)), [label for _, label in lone], rotation=30, ha="right")
    right.set_ylabel("TTFT (s)")
    right.set_title(f"One request of {setting.lone_tokens} alone")

    figure.suptitle(
        f"storage links {setting.storage_bits_per_s / 1e6:g} Mbit/s, "
        f"{setting.kv_bytes_per_token // 1024} KiB of KV a token"
    )
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)
