"""`dualpath doctor`: what it finds on this machine, in cluster files and in SGLang's flags."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dualpath_sgl.cli.__main__ import app
from dualpath_sgl.launch.checks import doctor
from dualpath_sgl.launch.checks.choice import choose, groups
from dualpath_sgl.launch.checks.doctor import FLAGS, MACHINE, Finding, Level
from dualpath_sgl.launch.checks.flag_check import Judgement, judge
from dualpath_sgl.launch.config.cluster import ClusterConfig, Mode, load
from dualpath_sgl.launch.plan.fixed import host_plan
from dualpath_sgl.launch.setup.pins import Profile, pins
from dualpath_sgl.launch.setup.tiny_model import TinyModel, build

PROJECT = Path(__file__).parents[2]
CLUSTERS = PROJECT / "launch" / "clusters"
WIDTH = 80


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build(TinyModel(), tmp_path_factory.mktemp("model"))


def environment(**changes: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("DUALPATH_", "MC_"))}
    return clean | {"DUALPATH_ENABLED": "1", "DUALPATH_ENGINE_ID": "e", "PYTHONPATH": str(PROJECT)} | changes


def quickstart_flags() -> list[str]:
    """The flags of the quick start's section on GPU clusters."""
    page = (PROJECT / "docs" / "quickstart.md").read_text()
    section = page.split("## On a GPU cluster")[1].split("\n## ")[0]
    (command,) = re.findall(r"-m dualpath_sgl\.launch\.engine \.\.\. (.*?)```", section, re.S)
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.case("readme_gpu_flags")
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_the_quick_start_s_flags_for_a_gpu_cluster_pass_without_a_warning(model, role):
    flags = [role if word == "prefill" else word for word in quickstart_flags()]
    if role == "decode":
        flags.append("--disaggregation-decode-enable-radix-cache")
    found = judge(["--model-path", str(model), "--device=cpu", *flags], environment())
    assert (found.mode, found.refusals, found.warnings) == ("decode-side", [], [])
    assert (found.resolved["page size"], found.resolved["prefetch policy"]) == (64, "wait_complete")


def test_the_quick_start_s_flags_are_those_that_the_launcher_gives_an_engine():
    plan = host_plan(load(CLUSTERS / "gpu-three-hosts.yaml"), PROJECT / "spans.jsonl", "/usr/bin")
    [argv] = [process.argv for process in plan if process.name == "prefill-0"]
    shown = " ".join(quickstart_flags()).replace(" --", "\n--").splitlines()
    assert {flag.replace(" ", "=", 1) for flag in shown} <= set(argv)


def test_what_sglang_itself_refuses_is_said_in_its_words(model):
    (problem,) = judge(["--model-path", str(model), "--no-such-flag"], environment()).refusals
    assert problem.why == "unrecognized arguments: --no-such-flag"


def test_the_environment_of_an_engine_is_judged_with_its_flags(model):
    flags = ["--model-path", str(model), "--device=cpu", *quickstart_flags()]
    flags.append("--disaggregation-transfer-backend=mooncake_tcp")
    wrong = environment(DUALPATH_PROTOCOL="rdma", http_proxy="http://127.0.0.1:9", no_proxy="")
    settings = {problem.setting for problem in judge(flags, wrong).refusals}
    assert {"DUALPATH_PROTOCOL", "http_proxy"} <= settings
    (problem,) = judge(flags, environment(DUALPATH_LEASE_S="soon")).refusals
    assert "DUALPATH_LEASE_S" in problem.why


def test_what_cannot_work_is_named_with_its_engines_and_nothing_is_found_on_the_shipped_ones():
    config = load(CLUSTERS / "cpu-1p1d.yaml").model_copy(update={"mode": Mode.DECODE_SIDE})
    group = config.decode.model_copy(update={"extra_args": ("--pp-size=2",)})
    found = doctor.examine(config.model_copy(update={"decode": group}), (), os.environ)
    of_engines = [finding for finding in found if finding.about != MACHINE and finding.level is not Level.OK]
    assert {finding.about for finding in of_engines} == {f"decode engines of {config.name}"}
    assert any("--pp-size is 2" in finding.text for finding in of_engines)
    shipped = [finding for finding in found if finding.about == f"prefill engines of {config.name}"]
    assert {finding.level for finding in shipped} == {Level.OK}
    assert "mode decode-side: DUALPATH_MODE is decode-side" in [finding.text for finding in shipped]


def test_upstream_s_modes_have_nothing_to_check():
    config = load(CLUSTERS / "cpu-1p1d.yaml").model_copy(update={"mode": Mode.BASIC})
    of_engines = [finding for finding in doctor.examine(config, (), os.environ) if finding.about != MACHINE]
    assert [finding.level for finding in of_engines] == [Level.OK]


# -- mode auto -----------------------------------------------------------------------------------


def test_on_gpus_relays_serve_sglang_s_fastest_layout():
    config = load(CLUSTERS / "gpu-1p1d.yaml")
    chosen, because = choose(config, os.environ)
    assert chosen.mode is Mode.RELAY and chosen.relay_names == ["relay-0"]
    assert because.startswith("SGLang's fastest page layout and I/O on GPUs")
    (prefill, _) = groups(chosen, os.environ)
    assert {"--hicache-mem-layout=page_first", "--hicache-io-backend=kernel"} <= set(prefill.flags)
    asked_for = config.model_copy(update={"mode": Mode.DECODE_SIDE})
    assert choose(asked_for, os.environ)[0].mode is Mode.DECODE_SIDE
    for group in groups(asked_for, os.environ):
        assert {"--hicache-mem-layout=page_first_direct", "--hicache-io-backend=direct"} <= set(group.flags)


def test_the_shipped_files_for_cpus_choose_decode_side_and_engines_would_agree():
    """Of the launcher's own flags nobody is asked, which takes no time: here it is."""
    config = load(CLUSTERS / "cpu-1p1d.yaml")
    assert config.mode is Mode.AUTO
    chosen, because = choose(config, os.environ)
    assert (chosen.mode, because) == (Mode.DECODE_SIDE, "nothing stands against it")
    for group in groups(chosen, os.environ):
        undecided = {name: value for name, value in group.environment.items() if name != "DUALPATH_MODE"}
        assert judge(group.flags, undecided).mode == "decode-side"


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"decode": {"tp_size": 2}}, "tp_size is 1 on prefill engines and 2 on decode engines"),
        (
            {"prefill": {"extra_args": ("--pp-size=2",)}},
            "--pp-size is 2: each rank has other parts of a page",
        ),
    ],
)
def test_relays_are_chosen_for_what_decode_side_loads_cannot_do(changes, because):
    config = load(CLUSTERS / "cpu-1p1d.yaml")
    document = config.model_dump()
    for name, value in changes.items():
        document[name] = document[name] | value if isinstance(value, dict) else value
    chosen, why = choose(ClusterConfig.model_validate(document), os.environ)
    assert chosen.mode is Mode.RELAY and why.startswith(because)
    assert chosen.relay_names == ["relay-0"]


def test_a_model_that_keeps_more_than_kv_runs_with_relays(model, tmp_path):
    """As SGLang reads its configuration."""
    directory = tmp_path / "windows"
    shutil.copytree(model, directory)
    described = json.loads((directory / "config.json").read_text())
    layers = described["num_hidden_layers"]
    described |= {
        "is_hybrid_swa": True,
        "hybrid_layer_pattern": [1] * (layers - 1) + [0],
        "sliding_window": 64,
    }
    (directory / "config.json").write_text(json.dumps(described))
    flags = ["--model-path", str(directory), "--device=cpu", *quickstart_flags()]
    found = judge(flags, environment())
    assert (found.mode, found.refusals) == ("relay", [])
    assert found.because.startswith("the model is sliding windows: ")


def test_an_engine_with_sglang_s_default_layout_runs_with_relays_and_doctor_says_so(model):
    flags = ["--disaggregation-mode=prefill", "--enable-hierarchical-cache", "--page-size=64"]
    flags += ["--hicache-storage-backend=mooncake", "--hicache-ratio=2", "--max-total-tokens=4096"]
    arguments = ["doctor", "--", "--model-path", str(model), "--device=cpu", *flags]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", **environment()})
    assert "mode relay: --hicache-mem-layout is page_first" in shown.output


def test_the_command_fails_for_what_will_not_work_and_fits_on_a_screen(model):
    arguments = ["doctor", "--", "--model-path", str(model), "--device=cpu", "--disaggregation-mode=prefill"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": str(WIDTH), "DUALPATH_ENABLED": "0"})
    assert shown.exit_code == 1
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= WIDTH and len(lines) < 50
    assert "DUALPATH_ENABLED is unset" in shown.output and "->" in shown.output


def test_as_json_the_findings_can_be_read_by_a_program():
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    document = json.loads(shown.output)
    assert document["works"] == (shown.exit_code == 0)
    assert any(finding["text"].startswith("sglang 0.5.23: patches") for finding in document["findings"])


def test_a_cluster_file_with_a_wrong_field_is_refused_as_by_the_launcher(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: c\ndevice: tpu\n")
    shown = CliRunner().invoke(app, ["doctor", "-c", str(file)])
    assert shown.exit_code == 1 and "device: got 'tpu'" in shown.output


GIB = 1024**3


def sized(pool_gib: float, ranks: int = 1) -> Judgement:
    return Judgement([], [], {"role": "prefill"}, "relay", "", int(pool_gib * GIB), ranks, 30 * GIB)


@pytest.mark.parametrize(
    ("judged", "store_gib", "level"),
    [
        ([(1, sized(8)), (1, sized(8))], 4, Level.OK),
        ([(2, sized(8)), (1, sized(8))], 0, Level.WARNING),
        ([(1, sized(8, ranks=4))], 0, Level.WARNING),
        ([(1, sized(8)), (1, sized(8))], 5, Level.WARNING),
        ([(1, sized(21))], 0, Level.REFUSED),
    ],
)
def test_pools_are_held_against_free_memory_less_what_sglang_leaves_alone(judged, store_gib, level):
    (finding,) = doctor._memory(judged, store_gib * GIB)
    assert finding.level is level


def test_less_is_left_alone_on_a_cpu():
    (finding,) = doctor._memory([(1, sized(21))], 0, doctor.HOST_RESERVE_BYTES)
    assert finding.level is Level.OK and "leaves 1 GiB alone" in finding.text


def test_pools_of_unknown_size_are_not_judged():
    assert list(doctor._memory([(1, Judgement([], [], {"role": "prefill"}))], 0)) == []


def test_a_warning_does_not_fail():
    assert doctor.works([Finding(FLAGS, Level.WARNING, "x"), Finding(FLAGS, Level.OK, "y")])
    assert not doctor.works([Finding(FLAGS, Level.REFUSED, "x")])


def test_the_cpu_profile_s_torch_is_the_makefile_s():
    tested = pins(Profile.CPU)["torch"]
    (file,) = re.findall(r"/\.torch: (\S+)", (PROJECT / "Makefile").read_text())
    assert f"\ntorch=={tested}+cpu " in (PROJECT / file).read_text()
