"""What the wheel and the sdist hold, against what the repository holds."""

import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

from installed_copy import build, to_be_installed


def contents(wheel: Path) -> dict[str, bytes]:
    """Of the packages, without the wheel's own metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(wheel):
    expected = {place: file.read_bytes() for place, file in to_be_installed().items()}
    found = contents(wheel)
    assert found.keys() - expected.keys() == set()
    assert expected.keys() - found.keys() == set()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_the_wheel_installs_two_packages(wheel):
    assert {name.partition("/")[0] for name in contents(wheel)} == {"dualpath_sgl", "scheduler_svc"}


def test_the_wheel_carries_the_licences(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert headers["License-Expression"] == "Apache-2.0"
    traces = {str(Path(name).parent) for name in names if name.endswith(".json") and "/data/" in name}
    assert traces and all({f"{folder}/LICENSE", f"{folder}/NOTICE"} <= set(names) for folder in traces)


def test_the_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive.getmembers() if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    assert links == [], "a tool may unpack an sdist where links are not allowed"
    (unpacked,) = tmp_path.iterdir()
    assert contents(build("wheel", unpacked, tmp_path)) == contents(wheel)
