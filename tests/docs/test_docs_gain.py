"""The README's picture shows the committed figures, and the texts beside it say the same."""

from __future__ import annotations

from doc_pages import PROJECT
from PIL import Image

from dualpath_sgl.evals.load.gain import SOURCE, Gains, draw, fingerprint

IMAGES = PROJECT / "docs" / "images"
FIGURES = IMAGES / "gain.json"


def test_the_picture_is_drawn_of_the_committed_figures():
    with Image.open(IMAGES / "gain.png") as picture:
        assert picture.text[SOURCE] == fingerprint(FIGURES.read_bytes()), "run: make docs"


def test_the_pages_give_the_gains_of_the_picture():
    gains = Gains.model_validate_json(FIGURES.read_bytes())
    readme, performance = ((PROJECT / page).read_text() for page in ("README.md", "docs/performance.md"))
    for run in gains.runs:
        assert run.gain <= run.limit
        seconds = f"({run.basic_s:.1f} s, {run.split_s:.1f} s)"
        assert (seconds in performance) == (run.device == "gpu")
        assert f"{run.gain:.2f}" in performance
    assert f"{gains.runs[0].gain:.2f}" in readme and f"{gains.runs[2].gain:.2f}" in readme


def test_a_run_more_is_drawn_too(tmp_path):
    gains = Gains.model_validate_json(FIGURES.read_bytes())
    larger = gains.model_copy(update={"runs": (*gains.runs, gains.runs[0])})
    sizes = []
    for each in (gains, larger):
        draw(each, tmp_path / "gain.png", "figures")
        with Image.open(tmp_path / "gain.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] > sizes[0][1]
