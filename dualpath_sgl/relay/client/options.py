"""What the backend's extra configuration says of relays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dualpath_sgl.relay.client.relays import Helper, parse_relay

OPTIONS_KEY = "relay"
"""In `--hicache-storage-backend-extra-config`."""
MIB = 2**20
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    relays: tuple[str, ...] = ()
    """Who may help, each `NAME=tcp://HOST:PORT`."""
    batch_bytes: Annotated[int, Field(ge=64 * 1024, le=2**30)] = 4 * MIB
    """What is claimed at a time, less towards the end of a load; a lane that brings it in less than 50 ms claims
    more."""
    least_call_bytes: Annotated[int, Field(ge=0)] = 1 * MIB
    """Calls with less ask no relay: messages would take longer than they save."""
    bounce_bytes: Annotated[int, Field(ge=8 * MIB, le=2**36)] = 512 * MIB
    """Memory of each rank that relays' bytes are pulled into: about five batches a relay.  On fast links more
    makes larger batches, which cost less."""
    silence_s: Positive = 1.25
    """A relay that owes an answer and says nothing, or whose bytes do not come, is given up so long after: a
    little longer than TCP takes to repeat a lost request for a connection."""

    @field_validator("relays")
    @classmethod
    def _named_once(cls, relays: tuple[str, ...]) -> tuple[str, ...]:
        names = [parse_relay(relay).name for relay in relays]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} stands there twice; give every relay a name of its own"
            )
        return relays

    @property
    def helpers(self) -> tuple[Helper, ...]:
        return tuple(parse_relay(relay) for relay in self.relays)


def options(extra_config: Mapping[str, Any]) -> Options:
    """Raises ValueError naming field, value and what is wrong."""
    try:
        return Options.model_validate(extra_config.get(OPTIONS_KEY, {}))
    except ValidationError as error:
        raise ValueError(
            "; ".join(
                f"{OPTIONS_KEY}.{'.'.join(map(str, problem['loc']))} is {problem['input']!r} in "
                f"--hicache-storage-backend-extra-config: {problem['msg']}"
                for problem in error.errors(include_url=False)
            )
        ) from None
