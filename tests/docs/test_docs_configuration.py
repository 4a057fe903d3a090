"""docs/configuration.md is what the code says."""

from __future__ import annotations

from doc_pages import PROJECT

from dualpath_sgl.cli import configuration_page


def test_the_page_is_made_of_this_code():
    committed = (PROJECT / "docs" / "configuration.md").read_text()
    assert committed == configuration_page.page(), "run: make docs"


def test_no_setting_no_field_and_no_router_option_is_without_a_meaning():
    rows = [line for line in configuration_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    before_the_commands = configuration_page.page().split(configuration_page.COMMAND)[0]
    assert "|  |\n" not in before_the_commands
