"""The report of recorded cells (recorded_matrix/, from shaped 1P1D clusters): sentences, plots, page.

The cells are of two runs on a busy machine, `basic` with 12 agents instead of 14: what is drawn and told is tested
here, not how large a gain is.
"""

import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib import image

from dualpath_sgl.evals.common.errors import EvalError
from dualpath_sgl.evals.matrix import results
from dualpath_sgl.evals.matrix.experiment import ServiceLevel
from dualpath_sgl.evals.matrix.results import CellResult, Failure, Failures, Probe, finished_cells
from dualpath_sgl.evals.report import links, story, style, throughput
from dualpath_sgl.evals.report.groups import comparisons, engine_order, modes_of
from dualpath_sgl.evals.report.page import write_report

RECORDED = Path(__file__).parent / "recorded_matrix"
MANY, FEW = "14-agents-4-at-once", "2-agents-1-at-once"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def out(tmp_path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "out"))


@pytest.fixture(scope="module")
def cells() -> list[CellResult]:
    found = {cell.name: cell for cell in finished_cells(RECORDED)}
    names = [f"1p1d--{mode}--coding--{load}" for mode in ("basic", "default") for load in (MANY, FEW)]
    return [found[name] for name in names]


def varied(cell: CellResult, **changes) -> CellResult:
    return cell.model_copy(update=changes)


class Images(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.other_addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            self.found.append(given)
        else:
            self.other_addresses += [given[name] for name in ("src", "href") if name in given]


def test_the_page_holds_everything_itself_once_for_light_and_once_for_dark(out):
    text = write_report(out).read_text()
    images = Images(text)
    assert all(each["src"].startswith("data:image/png;base64,") for each in images.found)
    assert all(address.startswith(("#", "data:")) for address in images.other_addresses)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    kinds = [each["class"] for each in images.found]
    assert kinds.count("light") == kinds.count("dark") >= 8
    assert all(len(each["alt"]) > 30 for each in images.found), "a picture says in words what it shows"
    pictures = {file.name for file in (out / "report").glob("*.png")}
    assert len(pictures) == len(images.found) and "01-jct.png" in pictures and "01-jct-dark.png" in pictures


def test_the_page_names_its_environment_seeds_command_and_experiment(out):
    text = write_report(out).read_text()
    for told in ("command", "sglang", "torch", "cores", "seeds", "kind: offline"):
        assert told in text
    assert "not measured" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_page_opens_in_a_browser_without_errors_and_every_plot_is_seen(out, tmp_path):
    written = write_report(out)
    # Only the copy has a script: it says what the browser made of the page.
    seen = """<script>addEventListener("load", () => { document.title = "images " + [...document.images].filter(
        i => i.naturalWidth > 600 && getComputedStyle(i).display != "none").length +
        " wide " + (document.documentElement.scrollWidth > innerWidth) })</script></body>"""
    copy = tmp_path / "seen.html"
    copy.write_text(written.read_text().replace("</body>", seen))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,900", "--dump-dom"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=120)
    plots = len(list((out / "report").glob("*-dark.png")))
    assert f"<title>images {plots} wide false</title>" in done.stdout
    assert "CONSOLE" not in done.stderr


def test_plots_lie_on_the_paper_of_their_theme_and_something_on_it(out):
    write_report(out)
    for name, theme in (("01-jct.png", style.LIGHT), ("01-links-dark.png", style.DARK)):
        pixels = image.imread(out / "report" / name)[..., :3]
        paper = [int(theme.paper[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        is_paper = (abs(pixels - paper) < 0.01).all(axis=2)
        assert is_paper[0].all() and 0.3 < is_paper.mean() < 0.97


def test_the_story_says_how_much_faster_why_and_where_it_does_not_help(cells):
    many, few = comparisons(cells)
    gain = many.base.job_s / many.modes["default"].job_s
    (line,) = story.gains(many).lines
    assert line.startswith(f"default: {gain:.2f} times as fast; its storage links alone would allow")
    assert "Storage links in use: prefill-0" in line and story.costs(many).lines == []
    assert "basic takes" in story.gains(many).opening and "decode-0 0%" in story.gains(many).opening
    (cost,) = story.costs(few).lines
    assert "nothing is read from the store" in cost and "TTFT" in cost and story.gains(few).lines == []
    best, busy, tokens = story.cards([many, few])
    assert best.value == f"{gain:.2f}{story.TIMES}" and "default on 1P1D" in best.what
    assert "→" in busy.value and tokens.value == "4 of 4"
    slow = many.modes["default"].first.model_copy(update={"topology": "1p2d", "job_s": 90.0})
    other = many.base.first.model_copy(update={"topology": "1p2d"})
    _, _, worst, _ = story.cards([many, *comparisons([other, slow])])
    assert worst.value.startswith("0.30") and "default on 1P2D" in worst.what


def test_what_does_not_help_is_explained_by_what_was_measured(cells):
    basic, few_basic, dualpath, _ = cells
    slow = varied(dualpath, job_s=basic.job_s)

    def why(*changed: CellResult) -> str:
        (comparison,) = comparisons(changed)
        (line,) = story.costs(comparison).lines
        return line

    only_decode = {
        name: engine.model_copy(update={"store_read_bytes": 10**9 * (name == "decode-0")})
        for name, engine in dualpath.engines.items()
    }
    busy = {"link_bits_per_s": round(basic.link_bits_per_s / 1.5)}
    idle = {"link_bits_per_s": basic.link_bits_per_s * 20}
    assert "storage is not the bottleneck" in why(varied(basic, **idle), slow)
    assert "one link carries all reads, that of decode-0" in why(
        varied(basic, job_s=basic.job_s / 2, **busy), varied(slow, engines=only_decode)
    )
    assert few_basic.read_bytes["prefill-0"] == 0


def test_wrong_tokens_missing_cells_and_failures_stand_at_the_top(out, cells):
    wrong = varied(cells[0], tokens_equal=False)
    results.write(wrong, out / results.CELLS / f"{wrong.name}.json")
    (out / results.CELLS / f"{cells[2].name}.json").unlink()
    failures = Failures(failures=[Failure(cell=cells[2].name, problem="<b>no memory</b>")])
    results.write(failures, out / results.FAILURES)
    text = write_report(out).read_text()
    top = text[: text.index("<nav>")]
    assert f"Tokens differ from the single server's in {wrong.name}" in top
    assert "1 cells are not measured" in top and "&lt;b&gt;no memory&lt;/b&gt;" in top


def test_a_folder_without_cells_or_of_something_else_is_told(out, tmp_path):
    with pytest.raises(EvalError, match="name a result folder"):
        write_report(tmp_path)
    shutil.rmtree(out / results.CELLS)
    with pytest.raises(EvalError, match="no cell of recorded is finished"):
        write_report(out)
    (out / results.EXPERIMENT_READ).write_text("{}")
    with pytest.raises(EvalError, match="another version"):
        write_report(out)


def test_loads_sweeps_and_searches_get_plots_of_their_own(cells):
    basic, _, dualpath, _ = cells
    level = ServiceLevel()
    by_load = [
        varied(cell, concurrency=concurrency, load=f"{concurrency}-at-once")
        for cell in (basic, dualpath)
        for concurrency in (1, 4)
    ]
    found = comparisons(by_load)
    assert throughput.against_load("x", "offline", found, modes_of(found), level)
    assert throughput.against_load("x", "offline", found[:1], modes_of(found), level) is None
    swept = [
        varied(cell, append=append, trace=f"coding-{append}")
        for cell in (basic, dualpath)
        for append in (1, 2)
    ]
    found = comparisons(swept)
    assert throughput.sweep("x", "append", found, modes_of(found))
    assert throughput.sweep("x", "generation", found, modes_of(found)) is None
    probe = Probe(agents_per_s=1, met=True, why="steady", ttft_s=1, tpot_s=0.01, requests=9, job_s=5)
    searched = comparisons([varied(basic, kind="capacity", probes=[probe], agents_per_s=1.2)])
    drawn = throughput.capacity("x", searched, ["basic"], level)
    assert drawn and "1p1d basic 1.2 agents/s" in drawn.alt
    assert throughput.capacity("x", found, ["basic"], level) is None
    assert image.imread(io.BytesIO(drawn.light)).shape[1] == style.WIDTH_IN * style.DPI


def test_a_deployment_whose_counters_nobody_reads_still_has_times(cells):
    nothing = cells[0].samples.model_copy(update={"link_bytes": {}, "read_bytes": {}, "paths": {}})
    bare = comparisons([varied(cells[0], samples=nothing, engines={}, policy=None)])
    assert links.busy("x", bare) is None and links.paths("x", bare) is None
    assert (
        "-" in story.row(bare[0], "basic")
        and "Read from the store: not counted" in story.gains(bare[0]).opening
    )


def test_engines_and_modes_keep_their_looks():
    names = ["decode-10", "prefill-1", "decode-2", "prefill-0"]
    assert engine_order(names) == ["prefill-0", "prefill-1", "decode-2", "decode-10"]
    modes = ["basic", "prefill", "split", "default"]
    looks = [style.of_mode(mode, modes) for mode in modes]
    assert len({look.light for look in looks}) == len({look.dark for look in looks}) == 4
