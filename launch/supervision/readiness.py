"""What must hold before a cluster is started, asked before anything runs."""

from __future__ import annotations

from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode
from dualpath_sgl.launch.processes.commands import asks_for_placement
from dualpath_sgl.launch.setup.patching import NotInstalled, PatchError, State, Tree, stacks
from dualpath_sgl.launch.setup.system_check import explain, missing_libraries


class NotReady(RuntimeError):
    """The message says what is missing and the command that puts it right."""


def require_ready(config: ClusterConfig) -> None:
    """Raises NotReady: system libraries, SGLang, patches (mode decode-side), namespaces (`network`)."""
    if missing := missing_libraries():
        raise NotReady(explain(missing))
    if config.network is not None:
        from dualpath_sgl.launch.topology.network import obstacles

        if found := obstacles():
            raise NotReady("\n".join(found))
    if config.mode is Mode.DECODE_SIDE:
        _require_patches("sglang")
    else:
        _require_installed("sglang")
    if asks_for_placement(config):
        _require_patches("sglang-router")


def _require_installed(package: str) -> None:
    for stack in stacks(package):
        try:
            Tree(stack).check()
        except NotInstalled as error:
            raise NotReady(str(error)) from None
        except PatchError:  # another release, which may do
            pass


def _require_patches(package: str) -> None:
    try:
        reports = [Tree(stack).check() for stack in stacks(package)]
    except PatchError as error:
        raise NotReady(str(error)) from None
    for report in reports:
        if report.state is not State.APPLIED:
            raise NotReady(
                f"this cluster needs the patches of {report.package} {report.version}, which "
                f"are {report.state}; run: dualpath patch apply"
            )
