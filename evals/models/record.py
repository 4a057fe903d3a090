"""results/models/summary.json: one entry for each model, device and mode, the newest run's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Record:
    model: str
    flags: str
    device: str
    mode: str
    requests: int
    """Answers that were compared."""
    tokens_equal: bool
    """Every token of every answer is that of one plain server."""
    relay_bytes: int
    """Read from the store by relays."""
    forwarded_bytes: int
    """Pulled out of decode engines."""
    fallbacks: int
    """Loads that did not end as they were begun: leases that ended before a pull did, fetches that relays
    refused, reads that decode engines broke off."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.device, self.mode


def keep(out: Path, record: Record) -> None:
    """Adds it to `out`/summary.json, in the place of an older one of the same kind."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    others = [Record(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    kept = [other for other in others if other.key != record.key] + [record]
    path.write_text(json.dumps([asdict(entry) for entry in kept], indent=1) + "\n")
