"""A run of the load benchmark on disk: what is measured is never lost, and never measured again."""

import pytest
from test_evals_load_plan import PLAN, measured

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.load.outcome import progress

SETTINGS = {"repetitions": 3, "cluster": {"name": "bench", "rates": [1, 2]}}
CELL = measured(next(PLAN.clusters[0].cells))


def begun(folder):
    run = progress.begin(folder, SETTINGS)
    run.expected = [(1, 2, 3), (4, 5, 6)]
    run.add(CELL.model_copy(update={"samples": []}), CELL.samples[0])
    run.save(folder)
    return run


def test_a_run_goes_on_with_what_it_has_measured(tmp_path):
    begun(tmp_path / "run")
    again = progress.begin(tmp_path / "run", SETTINGS)
    assert again.count(CELL.name) == 1 and again.count("1p1d/other/burst") == 0
    assert again.expected == [(1, 2, 3), (4, 5, 6)]
    again.add(CELL, CELL.samples[0])
    assert again.count(CELL.name) == 2


def test_cells_of_two_versions_of_the_sources_are_told_apart(tmp_path, monkeypatch):
    before = begun(tmp_path / "run").sources
    assert before == [progress.fingerprint()]
    assert progress.begin(tmp_path / "run", SETTINGS).sources == before
    monkeypatch.setattr(progress, "fingerprint", lambda: "another")
    assert progress.begin(tmp_path / "run", SETTINGS).sources == [*before, "another"]


def test_the_fingerprint_covers_what_is_linked_into_the_package(tmp_path):
    names = {file.name for file in progress.sources(progress.PACKAGES[0])}
    assert {"bench-load.yaml", "loader.py", "plan.py", "cluster.py"} <= names
    assert any(name.endswith(".patch") for name in names)


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(EvalError, match="unfinished run with other settings"):
        progress.begin(tmp_path / "run", SETTINGS | {"repetitions": 4})


def test_a_finished_run_is_not_added_to(tmp_path):
    run = begun(tmp_path / "run")
    assert not progress.is_finished(tmp_path / "run")
    run.finished = True
    run.save(tmp_path / "run")
    assert progress.is_finished(tmp_path / "run")
    with pytest.raises(EvalError, match="finished run"):
        progress.begin(tmp_path / "run", SETTINGS)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(EvalError, match="holds other files"):
        progress.begin(tmp_path, SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_that_was_cut_off_is_named(tmp_path):
    begun(tmp_path)
    path = tmp_path / progress.FILE
    path.write_text(path.read_text()[:100])
    with pytest.raises(EvalError, match=progress.FILE):
        progress.begin(tmp_path, SETTINGS)


def test_a_disk_that_fills_up_leaves_the_last_state(tmp_path):
    run = begun(tmp_path)
    before = (tmp_path / progress.FILE).read_text()
    # A directory in its place: the new state cannot be written.
    (tmp_path / f".{progress.FILE}").mkdir()
    run.add(CELL, CELL.samples[0])
    with pytest.raises(OSError):
        run.save(tmp_path)
    assert (tmp_path / progress.FILE).read_text() == before
