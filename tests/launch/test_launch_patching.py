"""The patch tool on installed packages made for the test: real files, real RECORD hashes."""

import base64
import difflib
import hashlib
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dualpath_sgl.launch.setup import patching
from dualpath_sgl.launch.setup.patching import PatchError, Stack, State, Tree, stacks

ONE = "".join(f"one {line}\n" for line in range(20))
TWO = "".join(f"two {line}\n" for line in range(20))
ONE_CHANGED = ONE.replace("one 3\n", "one three\n").replace("one 15\n", "one 15\none 15b\n")
ONE_TWICE_CHANGED = ONE_CHANGED.replace("one three\n", "one 3!\n")
TWO_CHANGED = TWO.replace("two 0\n", "")


def diff(name: str, old: str | None, new: str) -> str:
    source = "/dev/null" if old is None else f"a/{name}"
    lines = difflib.unified_diff((old or "").splitlines(True), new.splitlines(True), source, f"b/{name}")
    return "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines
    )


class Installed:
    """A package `demo` 1.0 in a site-packages of its own, and a patch root beside it."""

    def __init__(self, root: Path):
        self.site = root / "site-packages"
        self.patches = root / "patches"
        self.stack_directory = self.patches / "demo-1.0"
        self.stack_directory.mkdir(parents=True)
        (self.site / "demo-1.0.dist-info").mkdir(parents=True)
        self.set_version("1.0")
        self.write("demo/one.py", ONE)
        self.write("demo/two.py", TWO)
        rows = []
        for name, content in (("demo/one.py", ONE), ("demo/two.py", TWO)):
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(content)}\n")
        (self.site / "demo-1.0.dist-info" / "RECORD").write_text("".join(rows))

    def set_version(self, version: str) -> None:
        metadata = f"Metadata-Version: 2.1\nName: demo\nVersion: {version}\n"
        (self.site / "demo-1.0.dist-info" / "METADATA").write_text(metadata)

    def write(self, name: str, content: str) -> None:
        path = self.site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def read(self, name: str) -> str:
        return (self.site / name).read_text()

    def patch(self, name: str, *diffs: str) -> None:
        (self.stack_directory / f"{name}.patch").write_text("".join(diffs))

    @property
    def tree(self) -> Tree:
        return Tree(Stack.of(self.stack_directory), self.site)

    def contents(self) -> dict[str, str]:
        return {
            str(path.relative_to(self.site)): path.read_text()
            for path in sorted((self.site / "demo").rglob("*"))
            if path.is_file()
        }


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    made = Installed(tmp_path)
    made.patch("0001-both", diff("demo/one.py", ONE, ONE_CHANGED), diff("demo/two.py", TWO, TWO_CHANGED))
    made.patch("0002-again", diff("demo/one.py", ONE_CHANGED, ONE_TWICE_CHANGED))
    made.patch("0003-new-file", diff("demo/new.py", None, "new = 1\n"))
    return made


PATCHED = {"demo/new.py": "new = 1\n", "demo/one.py": ONE_TWICE_CHANGED, "demo/two.py": TWO_CHANGED}
PRISTINE = {"demo/one.py": ONE, "demo/two.py": TWO}


def test_apply_then_check_then_revert_goes_there_and_back(installed):
    assert installed.tree.check().state is State.NOT_APPLIED
    report = installed.tree.apply()
    assert (report.state, report.changed) == (State.APPLIED, True)
    assert report.patch_names == ("0001-both", "0002-again", "0003-new-file")
    assert installed.contents() == PATCHED
    assert installed.tree.check().state is State.APPLIED
    assert installed.tree.revert().changed
    assert installed.contents() == PRISTINE
    assert installed.tree.check().state is State.NOT_APPLIED


def test_applying_and_reverting_twice_changes_nothing_the_second_time(installed):
    installed.tree.apply()
    assert not installed.tree.apply().changed
    assert installed.contents() == PATCHED
    installed.tree.revert()
    assert not installed.tree.revert().changed
    assert installed.contents() == PRISTINE


def test_another_version_is_refused_with_both_versions_named(installed):
    installed.set_version("1.1")
    with pytest.raises(PatchError, match=r"demo 1\.1 is installed, but the patches are for 1\.0"):
        _ = installed.tree
    assert installed.contents() == PRISTINE


def test_a_package_that_is_not_installed_is_refused_with_the_pin_named(installed, tmp_path):
    with pytest.raises(PatchError, match=r"demo is not installed.*pip install demo==1\.0"):
        Tree(Stack.of(installed.stack_directory), tmp_path / "empty")


@pytest.mark.parametrize("act", ["apply", "revert"])
def test_a_half_patched_tree_is_reported_and_mended(installed, act):
    installed.write("demo/one.py", ONE_TWICE_CHANGED)
    report = installed.tree.check()
    assert report.state is State.HALF_APPLIED
    assert report.files == {
        "demo/new.py": State.NOT_APPLIED,
        "demo/one.py": State.APPLIED,
        "demo/two.py": State.NOT_APPLIED,
    }
    getattr(installed.tree, act)()
    assert installed.contents() == (PATCHED if act == "apply" else PRISTINE)


def test_a_file_with_only_the_first_patches_is_outdated_and_brought_up(installed):
    installed.tree.apply()
    installed.write("demo/one.py", ONE_CHANGED)
    assert installed.tree.check().files["demo/one.py"] is State.OUTDATED
    installed.tree.apply()
    assert installed.contents() == PATCHED


def test_patches_that_changed_since_they_were_applied_are_replaced(installed):
    installed.tree.apply()
    (installed.stack_directory / "0003-new-file.patch").unlink()
    installed.patch("0002-again", diff("demo/one.py", ONE_CHANGED, ONE_CHANGED + "end\n"))
    assert installed.tree.check().state is not State.APPLIED
    installed.tree.apply()
    assert installed.contents() == {"demo/one.py": ONE_CHANGED + "end\n", "demo/two.py": TWO_CHANGED}
    assert installed.tree.check().state is State.APPLIED
    installed.tree.revert()
    assert installed.contents() == PRISTINE


@pytest.mark.parametrize("act", ["apply", "revert"])
def test_someone_elses_change_is_reported_and_left_alone(installed, act):
    installed.write("demo/two.py", TWO + "mine\n")
    assert installed.tree.check().state is State.FOREIGN
    with pytest.raises(PatchError, match=r"demo/two\.py was modified by someone else; nothing was changed"):
        getattr(installed.tree, act)()
    assert installed.contents() == PRISTINE | {"demo/two.py": TWO + "mine\n"}


def test_a_hunk_that_is_one_line_off_is_refused(installed):
    shifted = "first\n" + ONE
    installed.patch("0001-both", diff("demo/one.py", shifted, shifted.replace("one 3\n", "one three\n")))
    with pytest.raises(PatchError, match=r"demo/one\.py: line \d+ is not what the patch expects"):
        installed.tree.apply()
    assert installed.contents() == PRISTINE


def test_a_failing_write_leaves_no_half_patched_tree(installed, monkeypatch):
    """The failure is made: no real disk fails on the second of three renames on demand."""
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(patching.os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        installed.tree.apply()
    assert installed.contents() == PRISTINE
    assert installed.tree.check().state is State.NOT_APPLIED


def test_a_last_line_without_line_feed_survives_both_ways(installed):
    installed.write("demo/one.py", "a\nb")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"a\nb").digest()).rstrip(b"=").decode()
    (installed.site / "demo-1.0.dist-info" / "RECORD").write_text(f"demo/one.py,sha256={digest},3\n")
    for patch in installed.stack_directory.iterdir():
        patch.unlink()
    installed.patch("0001-end", diff("demo/one.py", "a\nb", "a\nc"))
    installed.tree.apply()
    assert installed.read("demo/one.py") == "a\nc"
    installed.tree.revert()
    assert installed.read("demo/one.py") == "a\nb"


def test_python_never_runs_the_byte_code_of_the_other_state(installed):
    for patch in installed.stack_directory.iterdir():
        patch.unlink()
    # Same size: only the time stamp, in whole seconds, would tell the files apart.
    installed.patch("0001-same-size", diff("demo/one.py", ONE, ONE.replace("one 3\n", "one E\n")))
    stale = installed.site / "demo" / "__pycache__" / f"one.{sys.implementation.cache_tag}.pyc"
    stale.parent.mkdir()
    stale.write_bytes(b"stale")
    installed.tree.apply()
    assert not stale.exists()


def test_file_modes_are_kept(installed):
    path = installed.site / "demo/one.py"
    path.chmod(0o755)
    installed.tree.apply()
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_patch_file_that_is_no_diff_is_named(installed):
    installed.patch("0004-empty", "nothing here\n")
    with pytest.raises(PatchError, match="0004-empty.patch: holds no change"):
        installed.tree.check()


def test_an_unknown_package_is_refused_with_the_known_ones_named(installed):
    with pytest.raises(PatchError, match="no patches for 'other'; patched packages: demo"):
        stacks("other", installed.patches)
    assert [stack.package for stack in stacks(None, installed.patches)] == ["demo"]


class Editable:
    """The package `demo` 1.0, installed by pip from where it lies: its sources in `python`, as SGLang's are."""

    def __init__(self, root: Path):
        self.sources = root / "project" / "python"
        (self.sources / "demo").mkdir(parents=True)
        (self.sources / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            '[project]\nname = "demo"\nversion = "1.0"\n'
        )
        (self.sources / "demo" / "one.py").write_text(ONE)
        self.directory = root / "patches" / "demo-1.0"
        self.directory.mkdir(parents=True)
        (self.directory / "0001-one.patch").write_text(diff("demo/one.py", ONE, ONE_CHANGED))
        (self.directory / "0002-new.patch").write_text(diff("demo/new.py", None, "new = 1\n"))
        digest = hashlib.sha256(ONE.encode()).hexdigest()
        (self.directory / patching.SUMS).write_text(f"{digest}  demo/one.py\n")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        where = [f"--prefix={root / 'environment'}", "--disable-pip-version-check", "-e", self.sources]
        subprocess.run([*pip, *where], check=True, cwd=root, capture_output=True)
        [self.site] = (root / "environment").glob("lib/python*/site-packages")

    @property
    def tree(self) -> Tree:
        return Tree(Stack.of(self.directory), self.site)

    @property
    def one(self) -> Path:
        return self.sources / "demo" / "one.py"


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Editable:
    return Editable(tmp_path_factory.mktemp("editable"))


def test_an_editable_install_is_patched_where_its_sources_lie_and_brought_back(editable):
    assert editable.tree.check().state is State.NOT_APPLIED
    assert editable.tree.apply().state is State.APPLIED
    assert editable.one.read_text() == ONE_CHANGED
    assert (editable.sources / "demo" / "new.py").read_text() == "new = 1\n"
    assert not editable.tree.apply().changed
    assert editable.tree.revert().state is State.NOT_APPLIED
    assert editable.one.read_text() == ONE
    assert not (editable.sources / "demo" / "new.py").exists()


def test_an_editable_tree_with_other_changes_is_left_alone_with_the_remedy(editable):
    editable.one.write_text(ONE + "mine\n")
    with pytest.raises(PatchError, match=r"was modified by someone else.*Check version 1\.0 out in .*python"):
        editable.tree.apply()
    assert editable.one.read_text() == ONE + "mine\n"
    editable.one.write_text(ONE)


def test_an_editable_tree_without_known_sums_is_refused_with_the_remedy(editable, tmp_path):
    bare = tmp_path / "demo-1.0"
    bare.mkdir()
    (bare / "0001-one.patch").write_text(diff("demo/one.py", ONE, ONE_CHANGED))
    with pytest.raises(PatchError, match=r"SHA256SUMS is missing.*pip install --no-deps demo==1\.0"):
        Tree(Stack.of(bare), editable.site)


@pytest.mark.parametrize("stack", stacks(), ids=lambda stack: stack.directory.name)
def test_the_sums_beside_the_projects_patches_are_the_wheels(stack):
    recorded = {
        str(file): base64.urlsafe_b64decode(f"{file.hash.value}=").hex()
        for file in distribution(stack.package).files
        if file.hash is not None
    }
    edited = {name for name, changes in stack.by_target().items() if not changes[0].is_added_file}
    assert stack.pristine_sums() == {name: recorded[name] for name in edited}


@pytest.mark.parametrize("stack", stacks(), ids=lambda stack: stack.directory.name)
def test_the_projects_own_patches_are_known_to_fit_the_installed_package(stack):
    assert Tree(stack).check().state in set(State) - {State.FOREIGN}
