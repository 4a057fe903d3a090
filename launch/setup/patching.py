"""Applies the project's patches to installed packages: strictly, atomically, reversibly.

`patches/<package>-<version>/NNNN-name.patch` holds unified diffs whose paths (`a/`, `b/`) are
relative to site-packages.  A directory is one stack, applied in file-name order.

What is applied is decided from file content alone.  A wheel's RECORD carries the SHA-256 of
every file it installed; an editable install (SGLang's own images have one) records no file, and its
source tree is held against the stack's `SHA256SUMS`.  So a file is *pristine* when its hash is the
recorded one, *patched* when it equals pristine plus the whole stack, and *foreign* when neither the
stack nor the stack that was applied last (kept beside the package, so that changed patch files can
still be taken back) leads back to a recorded hash.  Hunks must match exactly, without fuzz or offset.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from unidiff import Hunk, PatchedFile, PatchSet
from unidiff.constants import LINE_TYPE_CONTEXT, LINE_TYPE_NO_NEWLINE
from unidiff.errors import UnidiffParseError

from dualpath_sgl import patches

PATCH_ROOT = Path(patches.__file__).parent
APPLIED_DIRECTORY = "dualpath-applied-patches"
"""Beside the package: a copy of each stack as it was applied last."""
SUMS = "SHA256SUMS"
"""In a stack's directory: the files that it changes as the wheel has them, in sha256sum's form."""
SOURCE_DIRECTORIES = ("", "src", "python")
"""Of a project, where its packages may lie."""


class PatchError(Exception):
    """The message names the package or file, what was found, and the remedy."""


class NotInstalled(PatchError):
    """There is nothing to be patched."""


class State(StrEnum):
    APPLIED = "applied"
    NOT_APPLIED = "not applied"
    OUTDATED = "outdated"
    """Every file carries patches, but not (all of) the present ones: apply again."""
    HALF_APPLIED = "half applied"
    """Some files carry patches and some do not; `apply` and `revert` both mend it."""
    FOREIGN = "modified by someone else"


@dataclass(frozen=True)
class Report:
    """What `check` found, and what `apply` and `revert` left."""

    package: str
    version: str
    patch_names: tuple[str, ...]
    state: State
    files: dict[str, State]
    """Per patched file, relative to the directory that the package lies in."""
    changed: bool = False


@dataclass(frozen=True)
class Stack:
    """The patches of one package version, in the order of application."""

    package: str
    version: str
    directory: Path

    @classmethod
    def of(cls, directory: Path) -> Stack:
        package, _, version = directory.name.rpartition("-")
        if not package:
            raise PatchError(f"patch directory {directory} is not named <package>-<version>")
        return cls(package, version, directory)

    @property
    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*.patch"))

    def pristine_sums(self) -> dict[str, str]:
        """SHA-256 (hex) of each file that the stack edits, as the wheel has it.  Raises PatchError."""
        sums = self.directory / SUMS
        if not sums.exists():
            raise PatchError(
                f"{self.package} {self.version} is an editable install, and {sums} is missing, which says what "
                f"its files are; install the wheel: pip install --no-deps {self.package}=={self.version}"
            )
        lines = (line.split(maxsplit=1) for line in sums.read_text(encoding="utf-8").splitlines())
        return {name: digest for digest, name in lines}

    def by_target(self) -> dict[str, list[PatchedFile]]:
        """Changes per file, in stack order."""
        changes: dict[str, list[PatchedFile]] = {}
        for patch in self.files:
            try:
                parsed = PatchSet(patch.read_text(encoding="utf-8"))
            except UnidiffParseError as error:
                raise PatchError(f"{patch}: not a unified diff ({error}); regenerate it") from None
            if not parsed:
                raise PatchError(f"{patch}: holds no change; delete or regenerate it")
            for change in parsed:
                if change.is_rename or change.is_removed_file or ".." in Path(change.path).parts:
                    raise PatchError(f"{patch}: {change.path}: only edits and new files can be patched")
                changes.setdefault(change.path, []).append(change)
        return changes


def stacks(package: str | None = None, root: Path = PATCH_ROOT) -> list[Stack]:
    """Every stack under `root`, or the named package's.  Raises PatchError for an unknown package."""
    found = [Stack.of(path) for path in sorted(root.iterdir()) if path.is_dir() and any(path.glob("*.patch"))]
    if package is None:
        return found
    wanted = [stack for stack in found if stack.package == package]
    if not wanted:
        known = ", ".join(stack.package for stack in found) or "none"
        raise PatchError(f"package: no patches for {package!r}; patched packages: {known}")
    return wanted


class Tree:
    """The installed files of one stack's package.

    `site_packages`: where to look for the distribution; None searches `sys.path`.
    """

    def __init__(self, stack: Stack, site_packages: Path | None = None):
        self.stack = stack
        distribution = _find(stack, site_packages)
        self._changes = stack.by_target()
        project = _editable_project(distribution)
        pinned = f"{stack.package}=={stack.version}"
        self._remedy = (
            f"Reinstall it, then try again: python -m pip install --force-reinstall --no-deps {pinned}"
            if project is None
            else f"Check version {stack.version} out in {project}, then try again"
        )
        if project is None:
            self._root = Path(str(distribution.locate_file("")))
            self._recorded = {
                str(file): base64.urlsafe_b64decode(f"{file.hash.value}=").hex()
                for file in distribution.files or ()
                if file.hash is not None
            }
        else:
            self._root = _source_root(project, stack, self._changes)
            self._recorded = stack.pristine_sums()
        self._applied = self._root / APPLIED_DIRECTORY / stack.directory.name
        earlier = Stack(stack.package, stack.version, self._applied)
        self._earlier_changes = earlier.by_target()

    def check(self) -> Report:
        states = {name: self._state(name) for name in self._all_targets()}
        return Report(
            self.stack.package,
            self.stack.version,
            tuple(path.stem for path in self.stack.files),
            _summary(set(states.values())),
            states,
        )

    def apply(self) -> Report:
        """Bring every file to pristine plus the stack, whatever known state it was in."""
        return self._bring_to(self._patched, keep_copy=True)

    def revert(self) -> Report:
        """Bring every file back to what was installed."""
        return self._bring_to(lambda name, pristine: pristine, keep_copy=False)

    def _bring_to(self, wanted, keep_copy: bool) -> Report:
        before = self.check()
        foreign = [name for name, state in before.files.items() if state is State.FOREIGN]
        if foreign:
            raise PatchError(
                f"{self.stack.package} {self.stack.version}: {', '.join(foreign)} was modified by someone "
                f"else; nothing was changed. {self._remedy}"
            )
        targets = {name: wanted(name, self._pristine(name)) for name in before.files}
        current = {name: self._read(name) for name in targets}
        changes = {name: text for name, text in targets.items() if text != current[name]}
        _replace_all(self._root, changes, current)
        shutil.rmtree(self._applied, ignore_errors=True)
        if keep_copy:
            self._applied.mkdir(parents=True)
            for patch in self.stack.files:
                shutil.copy(patch, self._applied)
        self._earlier_changes = self._changes if keep_copy else {}
        after = self.check()
        return Report(
            after.package, after.version, after.patch_names, after.state, after.files, bool(changes)
        )

    def _all_targets(self) -> list[str]:
        return sorted(self._changes.keys() | self._earlier_changes.keys())

    def _state(self, name: str) -> State:
        pristine = self._pristine(name)
        if pristine is _UNKNOWN:
            return State.FOREIGN
        content = self._read(name)
        if content == self._patched(name, pristine):
            # An earlier stack's file that this stack leaves alone counts as applied when pristine.
            return State.APPLIED
        return State.NOT_APPLIED if content == pristine else State.OUTDATED

    def _patched(self, name: str, pristine: str | None) -> str | None:
        content = pristine
        for change in self._changes.get(name, ()):
            content = _apply(change, content, reverse=False)
        return content

    def _pristine(self, name: str):
        """What was installed: text, None for no such file, _UNKNOWN if it cannot be derived."""
        content = self._read(name)
        for changes in (self._changes.get(name, []), self._earlier_changes.get(name, [])):
            # The top `count` patches may be missing: take back what is there, from there down.
            for count in range(len(changes), -1, -1):
                try:
                    candidate = content
                    for change in reversed(changes[:count]):
                        candidate = _apply(change, candidate, reverse=True)
                except PatchError:
                    continue
                if self._is_recorded(name, candidate):
                    return candidate
        return _UNKNOWN

    def _is_recorded(self, name: str, content: str | None) -> bool:
        if content is None:
            return name not in self._recorded
        return self._recorded.get(name) == hashlib.sha256(content.encode()).hexdigest()

    def _read(self, name: str) -> str | None:
        path = self._root / name
        return path.read_bytes().decode("utf-8") if path.exists() else None


_UNKNOWN = object()


def _summary(states: set[State]) -> State:
    if State.FOREIGN in states:
        return State.FOREIGN
    if len(states) == 1:
        return next(iter(states))
    return State.HALF_APPLIED if State.NOT_APPLIED in states else State.OUTDATED


def _find(stack: Stack, site_packages: Path | None) -> metadata.Distribution:
    path = sys.path if site_packages is None else [str(site_packages)]
    found = next(iter(metadata.distributions(name=stack.package, path=path)), None)
    pinned = f"{stack.package}=={stack.version}"
    if found is None:
        raise NotInstalled(
            f"{stack.package} is not installed; the patches are for {pinned}. Install all that was tested: "
            f"dualpath setup cpu, or dualpath setup cuda; or only this: pip install {pinned}"
        )
    if found.version != stack.version:
        raise PatchError(
            f"{stack.package} {found.version} is installed, but the patches are for {stack.version}; "
            f"nothing was changed. Install the pinned version: python -m pip install --no-deps {pinned}"
        )
    return found


def _editable_project(distribution: metadata.Distribution) -> Path | None:
    """The directory of the project that is installed from where it lies (PEP 610); None: it was copied."""
    text = distribution.read_text("direct_url.json")
    if text is None:
        return None
    origin = json.loads(text)
    if not origin.get("dir_info", {}).get("editable", False):
        return None
    return Path(url2pathname(urlsplit(origin["url"]).path))


def _source_root(project: Path, stack: Stack, targets: Iterable[str]) -> Path:
    """The directory in `project` that the package lies in.  Raises PatchError."""
    packages = {Path(target).parts[0] for target in targets}
    for directory in SOURCE_DIRECTORIES:
        if all((project / directory / package).is_dir() for package in packages):
            return project / directory
    raise PatchError(
        f"{stack.package} {stack.version} is an editable install of {project}, and {', '.join(sorted(packages))} "
        f"does not lie there; install the wheel: pip install --no-deps {stack.package}=={stack.version}"
    )


def _apply(change: PatchedFile, content: str | None, reverse: bool) -> str | None:
    """`content` with one file's hunks applied, or taken back.  Raises PatchError on any mismatch."""
    taken, given = ("+", "-") if reverse else ("-", "+")
    if change.is_added_file and (content is None) == reverse:
        raise PatchError(f"{change.path}: {'is missing' if reverse else 'exists already'}")
    if content is None and not change.is_added_file:
        raise PatchError(f"{change.path}: does not exist")
    lines = _lines(content or "")
    result: list[str] = []
    position = 0
    for hunk in change:
        start = hunk.target_start if reverse else hunk.source_start
        length = hunk.target_length if reverse else hunk.source_length
        begin = start - 1 if length else start
        expected = _side(hunk, taken)
        if lines[begin : begin + length] != expected or begin < position:
            raise PatchError(f"{change.path}: line {start} is not what the patch expects")
        result += lines[position:begin]
        result += _side(hunk, given)
        position = begin + length
    if change.is_added_file and reverse:
        return None
    return "".join(result + lines[position:])


def _side(hunk: Hunk, sign: str) -> list[str]:
    """The lines before (`-`) or after (`+`) the hunk's change."""
    lines: list[str] = []
    last_belongs = False
    for line in hunk:
        if line.line_type == LINE_TYPE_NO_NEWLINE:
            if last_belongs:
                lines[-1] = lines[-1].removesuffix("\n")
            continue
        last_belongs = line.line_type in (LINE_TYPE_CONTEXT, sign)
        if last_belongs:
            lines.append(line.value)
    return lines


def _lines(content: str) -> list[str]:
    """Split at line feeds only: form feeds and the like stay inside their lines, as in a diff."""
    return re.findall(r"[^\n]*\n|[^\n]+", content)


def _replace_all(root: Path, contents: dict[str, str | None], before: dict[str, str | None]) -> None:
    """Write every file (None deletes it) or, when one cannot be written, none of them."""
    staged: dict[str, Path] = {}
    done: list[str] = []
    try:
        for name, content in contents.items():
            if content is not None:
                staged[name] = _stage(root / name, content)
        for name, content in contents.items():
            if content is None:
                (root / name).unlink()
            else:
                os.replace(staged[name], root / name)
                del staged[name]
            done.append(name)
            _drop_bytecode(root / name)
    except BaseException:
        for name in done:
            if (content := before[name]) is None:
                (root / name).unlink()
            else:
                os.replace(_stage(root / name, content), root / name)
            _drop_bytecode(root / name)
        raise
    finally:
        for path in staged.values():
            path.unlink(missing_ok=True)


def _stage(path: Path, content: str) -> Path:
    """A complete copy beside `path`, on the same file system and with its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(name, path.stat().st_mode if path.exists() else 0o644)
    return Path(name)


def _drop_bytecode(path: Path) -> None:
    """Python compares time (whole seconds) and size only, so a swift edit could go unseen."""
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink(missing_ok=True)
