"""The pinned packages: complete, with hashes, of no particular index, and one version for each part."""

import re
import tomllib
from importlib import metadata

import pytest
from installed_copy import PROJECT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

FOLDER = PROJECT / "requirements"
PINNED = sorted(path.name for path in FOLDER.glob("*.txt"))
DECLARED = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def entries(name: str) -> list[str]:
    """Each requirement with its hashes, on one line."""
    text = (FOLDER / name).read_text().replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]


def pins(name: str) -> dict[str, str]:
    split = (entry.split()[0].split("==") for entry in entries(name))
    return {canonicalize_name(package): version for package, version in split}


def asked_for(*extras: str) -> list[Requirement]:
    lines = [
        *DECLARED["dependencies"],
        *(line for e in extras for line in DECLARED["optional-dependencies"][e]),
    ]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", PINNED)
def test_every_line_is_one_version_with_hashes_and_names_no_index(name):
    assert entries(name)
    for entry in entries(name):
        assert re.fullmatch(r"[\w.-]+==\S+( +--hash=sha256:[0-9a-f]{64})+ *", entry), entry[:200]
    assert "://" not in (FOLDER / name).read_text()


@pytest.mark.parametrize(
    ("name", "extras"), [("cpu.txt", ["test"]), ("cuda.txt", ["cuda", "test"]), ("image.txt", ["cuda"])]
)
def test_what_this_project_declares_is_pinned(name, extras):
    pinned = pins(name)
    for requirement in asked_for(*extras):
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_what_sglang_declares_is_pinned_for_cuda():
    pinned = pins("cuda.txt")
    for line in metadata.requires("sglang"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = pinned[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), (requirement, version)


def test_the_image_gets_the_versions_of_the_cuda_profile():
    assert pins("image.txt").items() <= pins("cuda.txt").items()


def test_the_profiles_agree_on_sglang_and_its_router():
    of_image, of_cpu = pins("image.txt"), pins("cpu.txt")
    assert {of_cpu[name] == of_image[name] for name in ("sglang", "sglang-router")} == {True}
    overruled = tomllib.loads((FOLDER / "uv.toml").read_text())["dependency-metadata"]
    assert {entry["name"]: entry["version"] for entry in overruled} == {
        "sglang": of_cpu["sglang"],
        "torch": pins("torch-cpu.txt")["torch"].removesuffix("+cpu"),
    }
