"""`summary.json` of the load benchmark."""

from __future__ import annotations

from dualpath_sgl.evals.load.outcome.cells import Cell, Goodput, Record
from dualpath_sgl.evals.load.outcome.figures import MAIN, Figure, Found, cpu_s_per_gib, figures

LEAST_READ = 0.98
"""Of what a cell has to read; links count headers, too."""


class Setting(Record):
    """What was measured, and how."""

    storage_bits_per_s: int
    compute_bits_per_s: int | None
    kv_bytes_per_token: int
    prompt_tokens: int
    """Of each prompt of a burst."""
    lone_tokens: int
    page_tokens: int
    requests: int
    repetitions: int


class Details(Record):
    figures: dict[str, Figure]
    cells: dict[str, Cell]
    goodput: Goodput | None
    setting: Setting
    sources: list[str]
    """Fingerprints of the sources that the cells were measured with: more than one, if a run went on after a
    change."""
    cpu_s_per_gib: dict[str, dict[str, float]]
    """Mode -> process -> CPU seconds of loading a GiB, waiting included."""
    basic_utilisation: float | None
    """Share of a 1P1D basic run in which the prefill engine's storage link was busy."""
    near_bound_utilisation: float | None
    """The same with the faster storage links of the `near_bound` cells."""
    near_bound_jct_ratio: dict[str, float]
    """Mode -> JCT basic/mode there."""
    store_peak_bytes_per_s: float
    """Sent by the store node in its busiest shaped measurement (mean over the measurement)."""
    store_capacity_bytes_per_s: float | None
    """One raw Mooncake read out of the store's namespace, unshaped."""


class LoadSummary(Record):
    """The figures of `MAIN` by name, and what they were made of under `details`.  None: not measured."""

    jct_ratio_1p1d_split: float | None
    jct_ratio_1p2d_split: float | None
    jct_ratio_1p1d_shorter_queue: float | None
    jct_split_1p1d_over_basic_2p1d: float | None
    load_ratio_lone_split: float | None
    ttft_ratio_lone_decode_over_prefill: float | None
    store_bytes_when_resident: int | None
    jct_ratio_not_storage_bound: float | None
    forward_goodput_ratio: float | None
    store_bytes_ratio_both_over_split: float | None
    jct_ratio_1p1d_relay: float | None
    jct_ratio_1p2d_relay: float | None
    load_ratio_lone_relay: float | None
    load_ratio_lone_two_relays: float | None
    tokens_equal: bool
    details: Details


def summarise(
    found: Found,
    setting: Setting,
    *,
    tokens_equal: bool,
    sources: list[str],
    store_capacity_bytes_per_s: float | None,
) -> LoadSummary:
    """`tokens_equal`: of the cold runs; those of the cells are added."""
    cells, made = found.cells, figures(found)
    samples = [sample for cell in cells.values() for sample in cell.samples]
    basic, near = cells.get("1p1d/basic/burst"), cells.get("1p1d/basic/near_bound")
    return LoadSummary.model_validate(
        {
            **{name: made[name].value for name in MAIN},
            "tokens_equal": tokens_equal and all(sample.tokens_equal for sample in samples),
            "details": Details(
                figures=made,
                cells=cells,
                goodput=found.goodput,
                setting=setting,
                sources=sources,
                cpu_s_per_gib=cpu_s_per_gib(cells),
                basic_utilisation=basic.busiest_link if basic else None,
                near_bound_utilisation=near.busiest_link if near else None,
                near_bound_jct_ratio={
                    mode: near.job_s / other.job_s
                    for mode in ("split", "relay")
                    if near and (other := cells.get(f"1p1d/{mode}/near_bound"))
                },
                store_peak_bytes_per_s=max(
                    (s.store_sent_bytes / s.job_s for s in samples if s.storage_utilisation is not None),
                    default=0.0,
                ),
                store_capacity_bytes_per_s=store_capacity_bytes_per_s,
            ),
        }
    )


def unmet(summary: LoadSummary) -> list[str]:
    """What must hold of any run, however fast the machine is."""
    problems = []
    if not summary.tokens_equal:
        problems.append("answers differ between cells: summary.json says in which")
    if summary.store_bytes_when_resident:
        problems.append(f"{summary.store_bytes_when_resident} bytes were read that the decode engine held")
    for name, cell in summary.details.cells.items():
        least = LEAST_READ * _stored_bytes(cell, summary.details.setting)
        read = min(sum(sample.storage_bytes.values()) for sample in cell.samples)
        if read < least:
            problems.append(
                f"{name}: only {read / 1e6:.1f} MB were read, of at least {least / 1e6:.1f}: something was not "
                "emptied, or prompts were computed"
            )
    return problems


def _stored_bytes(cell: Cell, setting: Setting) -> int:
    """What a measurement has to read."""
    if cell.load == "resident" or cell.mode.startswith("oracle"):
        return 0
    tokens = setting.lone_tokens if cell.load == "lone" else setting.prompt_tokens
    return cell.requests * (tokens // setting.page_tokens * setting.page_tokens) * setting.kv_bytes_per_token
