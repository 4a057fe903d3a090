"""What will not work on this machine, in a cluster or with an engine's flags, and what to do about it.

`dualpath doctor` asks the machine (patches, versions, libraries, network), then the flags of each group of
engines as SGLang resolves them (flag_check.py).  The rules about engines are dualpath_sgl/start/checks.py,
which each engine asks again when it starts.
"""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from itertools import groupby

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualpath_sgl.cpu_profile.plugin import HOST_RESERVE_BYTES
from dualpath_sgl.launch.checks.choice import choose
from dualpath_sgl.launch.checks.choice import groups as of_roles
from dualpath_sgl.launch.checks.flag_check import Judgement, judge
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode
from dualpath_sgl.launch.processes.commands import asks_for_placement
from dualpath_sgl.launch.setup.patching import NotInstalled, PatchError, State, Tree, stacks
from dualpath_sgl.launch.setup.pins import Profile, pins
from dualpath_sgl.launch.setup.system_check import missing_libraries
from dualpath_sgl.start.checks import Problem
from scheduler_svc.wire.reach import is_loopback

MOONCAKE_BUILDS = {
    "mooncake-transfer-engine-non-cuda": Profile.CPU,
    "mooncake-transfer-engine-cuda13": Profile.CUDA,
}
"""Distribution -> the profile that pins it."""
SETUP = "install what was tested: dualpath setup cpu, or dualpath setup cuda"
HICACHE_RESERVE_BYTES = 10 * 1024**3
"""SGLang lets no host pool take the last 10 GiB (sglang/srt/mem_cache/pool_host/base.py)."""
GB = 1e9
MACHINE = "this machine"
FLAGS = "the given flags"


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    REFUSED = "refused"
    """Will not work."""


@dataclass(frozen=True)
class Finding:
    about: str
    """MACHINE, FLAGS, or the engines of a cluster file."""
    level: Level
    text: str
    remedy: str | None = None

    @classmethod
    def of(cls, about: str, level: Level, problem: Problem) -> Finding:
        return cls(about, level, f"{problem.setting} is {problem.value}: {problem.why}", problem.remedy)


def examine(
    config: ClusterConfig | None, flags: Sequence[str], environment: Mapping[str, str]
) -> list[Finding]:
    """Findings about the machine, then about each group of engines.  Takes some ten seconds a group."""
    groups, found = [], []
    if config is not None:
        name = f"engines of {config.name}"
        try:
            config, because = choose(config, environment)
        except (RuntimeError, PatchError) as error:
            return [*_patches(config), *_versions(), Finding(name, Level.REFUSED, str(error), SETUP)]
        found.append(Finding(name, Level.OK, f"mode {config.mode}: {because}"))
        for group in of_roles(config, environment):
            groups.append((f"{group.role} {name}", group.count, group.flags, group.environment))
    if flags:
        groups.append((FLAGS, 1, list(flags), dict(environment)))
    with ThreadPoolExecutor(max_workers=2) as pool:
        asked = [pool.submit(judge, command, variables) for _, _, command, variables in groups]
        found = [*_patches(config), *_versions(), *_libraries(), _reachable(), *found]
        judged: list[tuple[int, Judgement]] = []
        for (about, count, _, _), answer in zip(groups, asked, strict=True):
            try:
                judged.append((count, answer.result()))
            except RuntimeError as error:
                found.append(Finding(about, Level.REFUSED, str(error), SETUP))
            else:
                found += _of_engine(about, judged[-1][1])
    store_bytes = config.store.segment_bytes if config is not None else 0
    on_cpu = all(variables.get("SGLANG_USE_CPU_ENGINE") == "1" for *_, variables in groups)
    reserve_bytes = HOST_RESERVE_BYTES if on_cpu else HICACHE_RESERVE_BYTES
    return [*found, *_memory(judged, store_bytes, reserve_bytes)]


def _patches(config: ClusterConfig | None) -> Iterable[Finding]:
    try:
        packages = [stack.package for stack in stacks()]
    except PatchError as error:
        yield Finding(MACHINE, Level.REFUSED, str(error))
        return
    for package in packages:
        is_sglang = package == "sglang"
        needed = config is not None and (
            config.mode is Mode.DECODE_SIDE if is_sglang else asks_for_placement(config)
        )
        level = Level.REFUSED if needed else Level.WARNING
        without = "without them relays serve every request" if is_sglang else "the placing router"
        for stack in stacks(package):
            try:
                report = Tree(stack).check()
            except PatchError as error:
                missing = isinstance(error, NotInstalled)
                yield Finding(MACHINE, Level.REFUSED if missing else level, str(error))
                continue
            text = f"{package} {report.version}: patches {report.state}"
            if report.state is State.APPLIED:
                yield Finding(MACHINE, Level.OK, text)
            else:
                remedy = f"dualpath patch apply --package {package}"
                yield Finding(MACHINE, level, text, remedy if needed else f"{remedy} ({without})")


def _versions() -> Iterable[Finding]:
    builds = {build: version for build in MOONCAKE_BUILDS if (version := _version(build)) is not None}
    if len(builds) != 1:
        yield Finding(
            MACHINE,
            Level.REFUSED,
            f"installed builds of Mooncake: {', '.join(builds) or 'none'}",
            f"uninstall all but one: pip uninstall {' '.join(builds)}; {SETUP}" if builds else SETUP,
        )
        return
    (build,) = builds
    profile = MOONCAKE_BUILDS[build]
    tested = pins(profile)
    for name in ("sglang-router", build, "torch"):
        installed = _version(name)
        if installed is not None and installed.partition("+")[0] == tested[name]:
            yield Finding(MACHINE, Level.OK, f"{name} {installed}")
            continue
        level = Level.REFUSED if installed is None else Level.WARNING
        text = f"{name} {installed or 'is not installed'}, tested is {tested[name]}"
        yield Finding(MACHINE, level, text, f"dualpath setup {profile}")
    if profile is Profile.CPU and importlib.util.find_spec("sgl_kernel") is None:
        yield Finding(
            MACHINE,
            Level.REFUSED,
            "SGLang's kernels have no CPU build, and their stand-ins are not importable",
            "dualpath setup cpu",
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _libraries() -> Iterable[Finding]:
    for library in missing_libraries():
        yield Finding(
            MACHINE,
            Level.REFUSED,
            f"missing system package {library.debian_package} ({library.soname}): {library.needed_by}",
            f"apt-get install {library.debian_package}",
        )


def _reachable() -> Finding:
    addresses = sorted(
        address.address
        for of_interface in psutil.net_if_addrs().values()
        for address in of_interface
        if address.family in (socket.AF_INET, socket.AF_INET6)
        and not is_loopback(address.address)
        and "%" not in address.address  # link-local
    )
    if not addresses:
        return Finding(MACHINE, Level.OK, "no address but loopback: nobody else reaches Mooncake")
    return Finding(
        MACHINE,
        Level.WARNING,
        "Mooncake listens on every address, whatever host is given, and authenticates nobody: whoever "
        f"reaches {', '.join(addresses)} reads and writes the KV of every request",
        "keep strangers out by a firewall: docs/security.md",
    )


def _of_engine(about: str, judgement: Judgement) -> list[Finding]:
    found = []
    if judgement.mode is not None:
        found.append(Finding(about, Level.OK, f"mode {judgement.mode}: {judgement.because}"))
    if judgement.resolved:
        text = ", ".join(f"{name} {value}" for name, value in judgement.resolved.items())
        found.append(Finding(about, Level.OK, text))
    found += [Finding.of(about, Level.REFUSED, problem) for problem in judgement.refusals]
    return found + [Finding.of(about, Level.WARNING, problem) for problem in judgement.warnings]


def _memory(
    judged: Sequence[tuple[int, Judgement]], store_bytes: int, reserve_bytes: int = HICACHE_RESERVE_BYTES
) -> Iterable[Finding]:
    """Host pools of all ranks, and the store's segment, against what SGLang would find free."""
    sized = [
        (count * found.ranks, found.pool_bytes, found.available_bytes)
        for count, found in judged
        if found.pool_bytes is not None and found.resolved
    ]
    if not sized:
        return
    free_bytes = min(available_bytes for _, _, available_bytes in sized) - reserve_bytes
    largest_bytes = max(pool_bytes for _, pool_bytes, _ in sized)
    pools_bytes = sum(pools * pool_bytes for pools, pool_bytes, _ in sized)
    text = (
        f"host pools {pools_bytes / GB:.1f} GB and store {store_bytes / GB:.1f} GB, free for them "
        f"{max(0, free_bytes) / GB:.1f} GB (SGLang leaves {reserve_bytes >> 30} GiB alone)"
    )
    remedy = "make the pools smaller (--hicache-size, host_pool in a cluster file), or free memory"
    if largest_bytes > free_bytes:
        yield Finding(MACHINE, Level.REFUSED, text, remedy)
    elif pools_bytes + store_bytes > free_bytes:
        yield Finding(MACHINE, Level.WARNING, text, remedy)
    else:
        yield Finding(MACHINE, Level.OK, text)


def works(findings: Iterable[Finding]) -> bool:
    """Whether nothing was found that will not work; warnings do not count."""
    return all(finding.level is not Level.REFUSED for finding in findings)


COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.REFUSED: "bold red"}


def show(findings: Sequence[Finding], console: Console) -> None:
    """One screen: what is well in a line for each part, what is not with its remedy."""
    parts = dict.fromkeys(finding.about for finding in findings)
    for about in parts:
        console.print(Text(about, style="bold"))
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        of_part = sorted((found for found in findings if found.about == about), key=_order)
        for level, group in groupby(of_part, key=lambda finding: finding.level):
            for text in _merged(level, list(group)):
                table.add_row(Text(f"  {level}", style=COLOURS[level]), text)
        console.print(table)
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(
        f"{counts[Level.REFUSED]} will not work, {counts[Level.WARNING]} warnings"
        if counts[Level.REFUSED] or counts[Level.WARNING]
        else "nothing found"
    )


def _order(finding: Finding) -> int:
    return [Level.REFUSED, Level.WARNING, Level.OK].index(finding.level)


def _merged(level: Level, group: list[Finding]) -> Iterable[Text]:
    if level is Level.OK:
        yield Text("; ".join(finding.text for finding in group), style="dim")
        return
    for finding in group:
        remedy = f"\n-> {finding.remedy}" if finding.remedy is not None else ""
        yield Text(f"{finding.text}{remedy}")
