"""What came from where, since the client began."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LaneCounts:
    """Of one helper; its lane's thread adds."""

    batches: int = 0
    """Landed."""
    bytes: int = 0
    objects: int = 0
    failed_objects: int = 0
    """That it could not bring; others were asked for them."""
    given_back: int = 0
    """Objects claimed for it that did not come, whatever the reason."""
    refused: int = 0
    invalid: int = 0
    """Batches pulled too late."""
    lost: int = 0
    """Times that it was given up: silent, gone, or its bytes did not come."""
    hung_pulls: int = 0
    """Of those, pulls that had begun and stayed where they were."""
    wait_s: float = 0.0
    """From asking for a batch to its being ready."""
    pull_s: float = 0.0
    copy_s: float = 0.0


@dataclass
class Counts:
    own_bytes: int = 0
    own_objects: int = 0
    loads: int = 0
    """Calls that asked relays."""
    direct_calls: int = 0
    """Calls that asked none: too small, or no relay was there."""
    overdue: int = 0
    """Objects taken from a relay at a load's end because they had not come."""
    relays: dict[str, LaneCounts] = field(default_factory=dict)
    residents: dict[str, LaneCounts] = field(default_factory=dict)
    """Of decode engines' ranks, by `Helper.label`."""

    @property
    def relay_bytes(self) -> int:
        return sum(lane.bytes for lane in list(self.relays.values()))

    @property
    def given_back(self) -> int:
        return sum(lane.given_back for lane in list(self.relays.values()))

    @property
    def lost(self) -> int:
        return sum(lane.lost for lane in list(self.relays.values()))

    @property
    def hung_pulls(self) -> int:
        return sum(lane.hung_pulls for lane in list(self.relays.values()))

    @property
    def forwarded_bytes(self) -> int:
        """Out of decode engines' host memory: nobody read them from the store."""
        return sum(lane.bytes for lane in list(self.residents.values()))
