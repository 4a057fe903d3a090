"""A cluster on one machine, as one YAML file describes it.

Every problem of a file is reported at once, each with field path, value and remedy.
"""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.hosts import checked, local_address
from dualpath_sgl.launch.config.kubernetes import Kubernetes, Rdma
from dualpath_sgl.launch.config.machines import FixedPorts, Host, HostName, check_known, place_engines
from dualpath_sgl.launch.config.otlp import checked_otlp
from dualpath_sgl.launch.config.security import OPERATOR, ROUTER, Security
from dualpath_sgl.launch.config.transport import Transport
from dualpath_sgl.launch.config.yaml_file import YamlProblem, read
from dualpath_sgl.launch.setup.tiny_model import TinyModel, build
from scheduler_svc.policies.path_policies import DEFAULT_PATH_POLICY, PATH_POLICIES
from scheduler_svc.policies.placement_policies import DEFAULT_PLACEMENT, PLACEMENT_POLICIES
from scheduler_svc.wire.reach import is_loopback


class ConfigError(ValueError):
    """One line per problem: field, value, remedy."""


class Mode(StrEnum):
    AUTO = "auto"
    """One of the next two, whichever suits model and flags (`launch/checks/choice.py`)."""
    DECODE_SIDE = "decode-side"
    """PE and DE read the store as the scheduler plans; pages are forwarded from DE to PE."""
    RELAY = "relay"
    """Relays beside the decode engines read the store for the prefill engines; decode engines are upstream's."""
    BASIC = "basic"
    """Upstream: only the PE has HiCache and reads the store."""
    BOTH = "both"
    """Upstream with decode-side L3 prefetch: PE and DE both read the store."""


MAX_PROBLEMS = 20
"""More of one file are counted, not told."""
MAX_PROBLEM_CHARS = 400
BIT_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
LOWEST_RATE, HIGHEST_RATE = 10**3, 10**14
"""Bits a second."""


def bits_per_s(rate: str) -> int:
    """`400mbit` -> 400000000.  Raises ValueError."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(kbit|mbit|gbit)", rate)
    bits = float(found[1]) * BIT_UNITS[found[2]] if found else 0
    if not LOWEST_RATE <= bits <= HIGHEST_RATE:
        raise ValueError(
            "give a number above 0 and kbit, mbit or gbit, such as 400mbit; from 1kbit to 100000gbit"
        )
    return round(bits)


def _is_rate(rate: str) -> str:
    bits_per_s(rate)
    return rate


BitRate = Annotated[str, AfterValidator(_is_rate)]


def _reaches_a_process(text: str) -> str:
    if any(character < " " and character not in "\t\n" for character in text):
        raise ValueError("holds a control character; remove it")
    return text


def _is_variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("is no name of an environment variable: letters, digits and _, no digit first")
    return name


ProcessText = Annotated[str, AfterValidator(_reaches_a_process)]
"""An argument of a command line, or the value of an environment variable."""


def _is_header(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name):
        raise ValueError("is no name of a header")
    return name


HeaderName = Annotated[str, AfterValidator(_is_header)]
Variable = Annotated[str, AfterValidator(_is_variable)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Tiny(_Section, TinyModel):
    """The seeded tiny model, built on first use."""

    kind: Literal["tiny"] = "tiny"
    """Weights are drawn from `seed`, so answers mean nothing but are repeatable."""

    def directory(self) -> Path:
        return build(TinyModel(**self.model_dump(exclude={"kind"})))


class ModelDirectory(_Section):
    """A model on disk, in Hugging Face form."""

    kind: Literal["directory"]
    """Must be given: it tells this form from the tiny one."""
    path: Path
    """Directory that holds `config.json` and the weights, on every host that has engines."""

    @property
    def is_here(self) -> bool:
        return (self.path / "config.json").is_file()

    def directory(self) -> Path:
        return self.path.absolute()


class Store(_Section):
    segment_bytes: int = Field(1 << 30, ge=16 << 20, le=1 << 50)
    """DRAM that the store node contributes; engines contribute none."""
    read_rate: BitRate | None = None
    """Each engine reads no faster than this: for measuring where links cannot be shaped (`network`)."""
    hosts: tuple[str, ...] = ()
    """Hosts with a store node each, all of this size; the master is on the first. Empty: the scheduler's."""


class Scheduler(_Section):
    policy: str = Field(DEFAULT_PATH_POLICY, json_schema_extra={"enum": [*PATH_POLICIES]})
    """Path policy: who reads which pages."""
    placement: str = Field(DEFAULT_PLACEMENT, json_schema_extra={"enum": [*PLACEMENT_POLICIES]})
    """Placement policy: which engines serve a request; only a `placing` router asks."""
    host: str | None = None
    """Its host, which is the span collector's, too; null: the first one."""

    @field_validator("policy")
    @classmethod
    def _is_known(cls, policy: str) -> str:
        if policy not in PATH_POLICIES:
            raise ValueError(f"choose one of {', '.join(PATH_POLICIES)}")
        return policy

    @field_validator("placement")
    @classmethod
    def _is_a_placement(cls, placement: str) -> str:
        if placement not in PLACEMENT_POLICIES:
            raise ValueError(f"choose one of {', '.join(PLACEMENT_POLICIES)}")
        return placement


class HostPool(_Section):
    """Size of an engine's host pool (L2): a multiple of its device pool, or gigabytes per rank."""

    ratio: Annotated[float, Field(gt=1, le=1000)] | None = None
    """Times the device pool."""
    size_gb: Annotated[int, Field(ge=1, le=1 << 16)] | None = None
    """Gigabytes of each rank."""

    @model_validator(mode="after")
    def _one_of_both(self) -> HostPool:
        if (self.ratio is None) == (self.size_gb is None):
            raise ValueError("exactly one of ratio and size_gb must be given")
        return self


class Group(_Section):
    """Engines of one role, all alike."""

    count: int = Field(1, ge=1, le=64)
    """Engines of this role."""
    tp_size: int = Field(1, ge=1, le=64)
    """Tensor-parallel ranks of each; on CUDA every rank takes a GPU. The same for both roles, or mode `relay`."""
    max_total_tokens: Annotated[int, Field(ge=256, le=1 << 30)] | None = None
    """Device pool (L1) in tokens; null lets SGLang take what memory allows."""
    host_pool: HostPool = HostPool(ratio=2.0)
    """Host pool (L2) of each engine."""
    extra_args: tuple[ProcessText, ...] = ()
    """Appended to SGLang's command line."""
    env: dict[Variable, ProcessText] = {}
    """Added to its environment last: what stands here wins over everything that the launcher sets."""
    hosts: tuple[str, ...] = ()
    """Hosts that they may be on; empty: all, on CUDA those that have GPUs."""


class Relays(_Section):
    """Each lives beside a decode engine and shares its links; those beyond the number of decode engines have
    links of their own.
    """

    count: Annotated[int, Field(ge=0, le=64)] | None = None
    """How many; null: in mode `relay` one for each decode engine, with decode-side loads none."""
    env: dict[Variable, ProcessText] = {}
    """Added to the environment of each last, such as `DUALPATH_RELAY_RING_BYTES`."""
    hosts: tuple[str, ...] = ()
    """Hosts of those that live beside no decode engine, in turn."""


class RouterKind(StrEnum):
    PLACING = "placing"
    """The patched Python router: the scheduler chooses the engines and the load path."""
    RUST = "rust"
    """SGLang's own: it chooses the engines, the scheduler only the load path.  Upstream's modes have no other."""


class Router(_Section):
    kind: RouterKind = RouterKind.PLACING
    """With `placing` the scheduler chooses the engines, too; `rust` is SGLang's own, and the only one of modes
    `basic` and `both`."""
    policy: Literal["random", "round_robin", "cache_aware", "power_of_two"] = "round_robin"
    """The Rust router's policy."""
    host: str | None = None
    """Its host; null: the scheduler's."""


class Tracing(_Section):
    enabled: bool = True
    """Record spans in the run directory."""
    sample_ratio: float = Field(1.0, ge=0, le=1)
    """Share of requests that are traced, of those without a `traceparent`; a caller's flag always counts."""
    otlp_endpoint: Annotated[str, AfterValidator(checked_otlp)] | None = None
    """Receiver (a Jaeger, say) that gets a copy of every span: `HOST:4317` or `grpcs://HOST:PORT` for OTLP/gRPC,
    `http://HOST:4318` or `https://HOST:PORT` for OTLP/HTTP."""
    otlp_headers: dict[HeaderName, ProcessText] = {}
    """Sent with each copy, such as a token."""
    otlp_ca_file: Path | None = None
    """Certificates (PEM) to trust instead of the system's."""

    @field_validator("otlp_ca_file")
    @classmethod
    def _is_a_file(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("is no file; name one with certificates in PEM form")
        return path


class Network(_Section):
    """Every engine in a network namespace with two shaped links of its own (needs root and iproute2).

    Rates are tc's: `400mbit`, `1.5gbit`; null leaves a link unshaped.
    """

    storage_rate: BitRate | None
    """Rate of each engine's link to the store."""
    compute_rate: BitRate | None = None
    """Rate of each engine's link to the other engines."""
    store_rate: BitRate | None = None
    """Rate of the store node's own link."""


class ClusterConfig(_Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=64)
    """Lower case letters, digits and dashes; shown by `dualpath status`."""
    device: Literal["cpu", "cuda"]
    """Where the engines compute."""
    host: Annotated[str, AfterValidator(checked)] = "127.0.0.1"
    """Address (or a name of it) that every part binds to and is reached at."""
    mode: Mode = Mode.AUTO
    """`decode-side` (decode engines load a part), `relay` (relays help prefill engines to read), `auto` (the
    former where model and flags allow it, else the latter), or upstream's: `basic` (only prefill engines read
    the store), `both` (all engines do)."""
    model: Annotated[Tiny | ModelDirectory, Field(discriminator="kind")] = Tiny()
    """What the engines serve."""
    page_size: int = Field(16, ge=1, le=1024)
    """Tokens of a page."""
    store: Store = Store()
    """The Mooncake store."""
    scheduler: Scheduler = Scheduler()
    """The scheduler, in modes `decode-side` and `relay`."""
    prefill: Group = Group()
    """The prefill engines."""
    decode: Group = Group()
    """The decode engines."""
    relays: Relays = Relays()
    """The relays."""
    transport: Transport = Transport()
    """TCP or RDMA, for each kind of bytes."""
    router: Router = Router()
    """What clients talk to."""
    tracing: Tracing = Tracing()
    """Spans of every request."""
    network: Network | None = None
    """Shaped links, one set for each engine; null: everything on `host`."""
    hosts: Annotated[dict[HostName, Host], Field(min_length=1)] | None = None
    """The machines of the cluster, by name; null: this one alone."""
    ports: FixedPorts = FixedPorts()
    """Where parts listen, with `hosts` and on Kubernetes."""
    kubernetes: Kubernetes | None = None
    """What `dualpath render kubernetes` needs; null: it is not for Kubernetes."""
    security: Security | None = None
    """Who may connect; null: only on loopback, or on a shaped `network`, whose links exist on this machine
    only."""

    @model_validator(mode="before")
    @classmethod
    def _has_no_former_field(cls, fields: object) -> object:
        if isinstance(fields, dict) and "transfer" in fields:
            raise ValueError("transfer is now called transport.pd: tcp for mooncake_tcp, rdma for mooncake")
        return fields

    @field_validator("mode", mode="before")
    @classmethod
    def _is_no_former_name(cls, mode: object) -> object:
        if mode == "dualpath":
            raise ValueError("is now called decode-side; auto, the default, chooses it where it can run")
        return mode

    @model_validator(mode="after")
    def _same_layout_on_both_sides(self) -> ClusterConfig:
        if self.mode is Mode.DECODE_SIDE and self.prefill.tp_size != self.decode.tp_size:
            raise ValueError(
                f"decode.tp_size {self.decode.tp_size} differs from prefill.tp_size {self.prefill.tp_size}: "
                "pages are forwarded only between equal layouts; make them equal, or use mode relay or auto"
            )
        return self

    @model_validator(mode="after")
    def _model_is_here(self) -> ClusterConfig:
        model = self.model
        is_elsewhere = self.hosts is not None or self.kubernetes is not None
        if is_elsewhere:
            self._check_paths_of_elsewhere()
        elif isinstance(model, ModelDirectory) and not model.is_here:
            raise ValueError(f"model: path {str(model.path)!r} holds no config.json: name a model directory")
        return self

    def _check_paths_of_elsewhere(self) -> None:
        keys = None if self.security is None or self.hosts is None else self.security.keys
        model = self.model.path if isinstance(self.model, ModelDirectory) else None
        for field, path in (("model.path", model), ("security.keys", keys)):
            if path is not None and not path.is_absolute():
                raise ValueError(
                    f"{field} is {str(path)!r}, which means another directory on each host; give it from / on"
                )

    @model_validator(mode="after")
    def _every_part_has_a_host(self) -> ClusterConfig:
        single = {"scheduler.host": self.scheduler.host, "router.host": self.router.host}
        several = {
            "prefill.hosts": self.prefill.hosts,
            "decode.hosts": self.decode.hosts,
            "relays.hosts": self.relays.hosts,
            "store.hosts": self.store.hosts,
        }
        for field, named in {**several, **{name: (one,) for name, one in single.items() if one}}.items():
            check_known(self.hosts, field, named)
        if self.hosts is not None:
            self._check_hosts(self.hosts)
        return self

    def _check_hosts(self, hosts: dict[str, Host]) -> None:
        if self.network is not None:
            raise ValueError("network makes links on this machine, and hosts names several; leave one out")
        if self.host != "127.0.0.1":
            raise ValueError(f"host is {self.host!r}, and hosts gives every part's address; leave host out")
        compute = [host.compute for host in hosts.values()]
        if len(set(compute)) < len(compute):
            raise ValueError("two of hosts have the same compute address; give each its own")
        self.placed_engines()
        if len(self.relay_names) > self.decode.count and not self.relays.hosts:
            raise ValueError(
                f"relays.count is {len(self.relay_names)} with {self.decode.count} decode engines; say in "
                "relays.hosts where those are that live beside none"
            )

    def placed_engines(self) -> dict[str, str]:
        """Host of each engine, by its name; empty without `hosts`."""
        groups = {"prefill": self.prefill, "decode": self.decode}
        return place_engines(self.hosts, groups, self.device == "cuda") if self.hosts else {}

    @model_validator(mode="after")
    def _pods_can_run_it(self) -> ClusterConfig:
        pods = self.kubernetes
        if pods is None:
            return self
        if self.hosts is not None or self.network is not None or self.host != "127.0.0.1":
            raise ValueError("kubernetes gives every pod an address; leave out hosts, network and host")
        if not isinstance(self.model, ModelDirectory):
            raise ValueError(
                "kubernetes: pods need a model that is there; give model: {kind: directory, path: ...}"
            )
        if self.router.kind is RouterKind.PLACING and pods.pod_network is None:
            raise ValueError(
                "kubernetes.pod_network must be given with router.kind placing, such as 10.244.0.0/16: engines "
                "are known by the addresses that their pods get"
            )
        if self.security is None:
            raise ValueError(
                "kubernetes: other pods can reach every part, and nothing says who may: give security: {keys: "
                "DIRECTORY} (made by `dualpath keys generate`), or security: {trusted_network: true} where a "
                "network policy is enforced"
            )
        return self

    @model_validator(mode="after")
    def _strangers_stay_out(self) -> ClusterConfig:
        own = {"host": self.host}
        for name, host in (self.hosts or {}).items():
            own |= {f"hosts.{name}.compute": host.compute, f"hosts.{name}.storage": host.storage_address}
        reachable = [field for field, address in own.items() if not is_loopback(address)]
        if self.security is None and reachable:
            raise ValueError(
                f"{reachable[0]} is {own[reachable[0]]!r}, which other hosts can reach, and nothing says who may: give "
                "security: {keys: DIRECTORY} (made by `dualpath keys generate`), security: "
                "{trusted_network: true} if everybody on that network is trusted, or host: 127.0.0.1"
            )
        if self.security is not None:
            self.security.check(self.key_names())
        return self

    @property
    def relay_names(self) -> list[str]:
        """In mode auto those that there may be."""
        if self.mode in (Mode.BASIC, Mode.BOTH):
            return []
        by_default = 0 if self.mode is Mode.DECODE_SIDE else self.decode.count
        count = by_default if self.relays.count is None else self.relays.count
        return [f"relay-{index}" for index in range(count)]

    def key_names(self) -> list[str]:
        """Peers that get a key of their own: engines, relays, a placing router, and who looks after it all."""
        groups = {"prefill": self.prefill, "decode": self.decode}
        engines = [f"{role}-{index}" for role, group in groups.items() for index in range(group.count)]
        routers = [ROUTER] if self.router.kind is RouterKind.PLACING else []
        return [*engines, *self.relay_names, *routers, OPERATOR]


def load(path: Path) -> ClusterConfig:
    """Read a cluster description.  Raises ConfigError."""
    try:
        content = read(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; shipped examples: {_examples()}") from None
    except YamlProblem as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping of fields, got {type(content).__name__}")
    try:
        return ClusterConfig.model_validate(content)
    except ValidationError as error:
        problems = [_explain(problem) for problem in error.errors(include_url=False)]
        told = [f"{path}: {problem[:MAX_PROBLEM_CHARS]}" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            told.append(f"{path}: and {len(problems) - MAX_PROBLEMS} problems more")
        raise ConfigError("\n".join(told)) from None


def at_its_address(config: ClusterConfig) -> ClusterConfig:
    """With the address of `host`, which this machine must have, in its place.  Raises ConfigError."""
    try:
        return config.model_copy(update={"host": local_address(config.host)})
    except ValueError as error:
        raise ConfigError(f"host: got {config.host!r}; {error}") from None


def kv_bytes_per_token(config: ClusterConfig) -> int:
    """Bytes of KV cache per token, all layers and ranks, from the model's `config.json`.

    Raises ConfigError when that does not tell.
    """
    path = config.model.directory() / "config.json"
    item_bytes = 4 if config.device == "cpu" else 2
    try:
        model = json.loads(path.read_bytes())
        if "kv_lora_rank" in model:  # MLA keeps one compressed vector.
            width = model["kv_lora_rank"] + model["qk_rope_head_dim"]
        else:
            head_dim = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
            width = 2 * model.get("num_key_value_heads", model["num_attention_heads"]) * head_dim
        return model["num_hidden_layers"] * width * item_bytes
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"model: {path} does not say how large a token's KV is ({error!r}); evaluations need a model "
            "with one kind of attention"
        ) from None


def _examples() -> str:
    return ", ".join(sorted(str(path) for path in CLUSTERS.glob("*.yaml")))


def _explain(problem: ErrorDetails) -> str:
    # The tag of a tagged union ("tiny", "directory") is in the location, but not in the file.
    parts = list(problem["loc"])
    if len(parts) > 1 and parts[0] == "model" and parts[1] in ("tiny", "directory"):
        del parts[1]
    field = ".".join(_printable(part) for part in parts) or "file"
    if problem["type"] == "extra_forbidden":
        known = _fields(parts[:-1])
        close = difflib.get_close_matches(str(parts[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known fields: {', '.join(known)}"
        return f"{field}: unknown field; {hint}"
    if problem["type"] == "missing":
        return f"{field}: must be given"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "string_type":
        message += ": put it in quotes"
    if isinstance(problem["input"], dict):
        return f"{field}: {message}"
    return f"{field}: got {_shown.repr(problem['input'])}; {message[0].lower()}{message[1:]}"


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 80


def _printable(part: object) -> str:
    """A name out of the file: short, and nothing that a terminal would obey."""
    text = str(part)
    return text if text.isprintable() and len(text) <= 80 else _shown.repr(text)


def _fields(path: Sequence[int | str]) -> list[str]:
    """Names that may stand at `path` of a cluster description."""
    sections: dict[str, type[BaseModel]] = {
        "store": Store,
        "scheduler": Scheduler,
        "router": Router,
        "tracing": Tracing,
        "relays": Relays,
        "model": Tiny,
    }
    sections |= {"prefill": Group, "decode": Group, "network": Network, "security": Security}
    sections |= {"transport": Transport, "ports": FixedPorts, "hosts": Host}
    sections["kubernetes"] = Rdma if path and path[-1] == "rdma" else Kubernetes
    model: type[BaseModel] = ClusterConfig
    if path:
        model = HostPool if path[-1] == "host_pool" else sections[str(path[0])]
    return list(model.model_fields)
