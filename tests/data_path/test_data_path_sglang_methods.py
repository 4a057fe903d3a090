"""SGLang's methods are those that DualPath's hooks were written for (docs/upgrade.md)."""

import json

import pytest
import sglang_methods
from sglang_methods import DIGESTS, changes, digests, relied_on, watched

METHOD = "managers.scheduler.Scheduler.on_idle"
SOURCE = '''
class Scheduler:
    def on_idle(self):
        """Nothing to do."""
        self.sleep(1)  # a while
'''


@pytest.fixture
def sglang(tmp_path):
    """Writes a stand-in for SGLang's scheduler and returns its digest."""
    (tmp_path / "srt/managers").mkdir(parents=True)

    def write(source: str) -> str | None:
        (tmp_path / "srt/managers/scheduler.py").write_text(source)
        return digests({METHOD: ""}, tmp_path)[METHOD]

    return write


def test_every_method_that_dualpath_depends_on_is_as_it_was():
    found = changes(digests(watched()), json.loads(DIGESTS.read_text()))
    assert not found, "\n".join([*found, f"Read docs/upgrade.md, then run {sglang_methods.__file__}"])


def test_the_table_of_digests_and_the_guide_name_exactly_those_methods():
    assert json.loads(DIGESTS.read_text()).keys() == relied_on().keys() == watched().keys()


def test_comments_docstrings_and_layout_do_not_count(sglang):
    before = sglang(SOURCE)
    assert sglang(SOURCE.replace("Nothing to do.", "Idle.").replace("  # a while", "\n")) == before


@pytest.mark.parametrize("change", [("sleep(1)", "sleep(2)"), ("(self)", "(self, now)")])
def test_another_statement_or_argument_counts(sglang, change):
    assert sglang(SOURCE) != sglang(SOURCE.replace(*change)) is not None


def test_a_method_that_moved_is_gone(sglang):
    assert sglang(SOURCE.replace("on_idle", "when_idle")) is None
    assert sglang(SOURCE.replace("Scheduler", "Loop")) is None
    assert digests({"nowhere.f": ""})["nowhere.f"] is None


def test_what_has_changed_is_told_with_the_hook_and_what_it_relies_on():
    method = "managers.scheduler.Scheduler._prefetch_kvcache"
    (told,) = changes({method: "new"}, {method: "old"})
    assert told.startswith(f"sglang.srt.{method} has changed; hooked by hooks.before_prefetch_kvcache")
    assert relied_on()[method] in told
    (gone,) = changes({method: None}, {method: "old"})
    assert "is gone" in gone
