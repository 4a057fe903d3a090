import pytest

from dualpath_sgl.launch.setup.system_check import LIBRARIES, Library, explain, missing_libraries

ABSENT = Library("libdualpath-absent.so.9", "libabsent9", "this test needs it")


def test_only_the_missing_library_is_reported():
    present = Library("libc.so.6", "libc6", "everything")
    assert missing_libraries((present, ABSENT)) == [ABSENT]


@pytest.mark.parametrize("name", ["dualpath-absent-command", "dualpath/absent.h"])
def test_commands_and_headers_are_looked_for_too(name):
    absent = Library(name, "absent", "this test needs it")
    present = (Library("sh", "dash", "everything"), Library("stdio.h", "libc6-dev", "everything"))
    assert missing_libraries((*present, absent)) == [absent]


def test_the_explanation_says_which_why_and_the_command():
    text = explain([ABSENT])
    assert "libdualpath-absent.so.9: this test needs it" in text
    assert "apt-get install -y libabsent9" in text


def test_this_machine_has_what_the_suite_is_about_to_use():
    assert missing_libraries(LIBRARIES) == []
