"""What `dualpath render hosts` writes: read back, and judged by systemd's own checker."""

import configparser
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster_on_hosts import described, loaded, on_hosts
from typer.testing import CliRunner

from dualpath_sgl.launch.plan.process import Audience
from dualpath_sgl.launch.render.command import render_app
from dualpath_sgl.launch.render.hosts import Options, render_hosts
from dualpath_sgl.launch.render.quoting import command_line, environment_line

OPTIONS = Options(Path("/opt/dualpath/bin/python"), "dualpath")


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return render_hosts(loaded(tmp_path), list(on_hosts(tmp_path).values()), OPTIONS)


def unit(text: str) -> configparser.ConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str
    parser.read_string(text)
    return parser


def words(exec_start: str) -> list[str]:
    """As systemd reads them: its quotes and escapes are among the shell's."""
    return [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(exec_start)]


def test_each_host_gets_its_own_processes_and_nobody_else_s(files):
    services = {name for name in files if name.endswith(".service")}
    assert services == {
        f"{host}/dualpath-agents-{name}.service"
        for host, names in {
            "gpu1": ("prefill-0", "prefill-1"),
            "gpu2": ("decode-0", "decode-1"),
            "mem1": ("master", "collector", "scheduler", "store", "router"),
        }.items()
        for name in names
    }
    for host in ("gpu1", "gpu2", "mem1"):
        assert {
            f"{host}/dualpath-agents.target",
            f"{host}/firewall.nft",
            f"{host}/install.sh",
        } <= files.keys()


def test_a_unit_starts_what_the_plan_says_with_the_hosts_interpreter(files, tmp_path):
    for name, process in on_hosts(tmp_path).items():
        service = unit(files[f"{process.place}/dualpath-agents-{name}.service"])["Service"]
        argv = words(service["ExecStart"])
        assert argv[1:] == list(process.argv[1:])
        program = "mooncake_master" if name == "master" else "python"
        assert argv[0] == f"/opt/dualpath/bin/{program}"
        assert service["User"] == "dualpath" and service["Restart"] == "always"
        assert service["KillSignal"] == process.stop.name


def test_an_environment_file_holds_the_plan_s_environment(files, tmp_path):
    for name, process in on_hosts(tmp_path).items():
        lines = files[f"{process.place}/env/{name}"].splitlines()
        read = dict("".join(shlex.split(line)).split("=", 1) for line in lines)
        assert read == dict(process.env)


def test_units_wait_for_those_of_their_own_host_only(files):
    after = {name: unit(text)["Unit"]["After"] for name, text in files.items() if name.endswith(".service")}
    assert after["gpu2/dualpath-agents-decode-0.service"] == "network-online.target"
    assert "dualpath-agents-master.service" in after["mem1/dualpath-agents-store.service"]


def test_memory_may_be_pinned_where_rdma_needs_it(files):
    has = {name for name, text in files.items() if "LimitMEMLOCK=infinity" in text}
    assert "gpu1/dualpath-agents-prefill-0.service" in has and "mem1/dualpath-agents-store.service" in has
    assert "mem1/dualpath-agents-scheduler.service" not in has


def test_the_firewall_admits_the_cluster_to_every_port_and_strangers_to_none(files, tmp_path):
    plan = on_hosts(tmp_path)
    for host in ("gpu1", "gpu2", "mem1"):
        text = files[f"{host}/firewall.nft"]
        [listed] = re.findall(r"ip saddr @cluster4 tcp dport \{ (.*) \} accept", text)
        assert f"    tcp dport {{ {listed} }} drop" in text
        bounds = [(int(part.split("-")[0]), int(part.split("-")[-1])) for part in listed.split(", ")]
        assert all(one[1] < next_one[0] for one, next_one in itertools.pairwise(bounds)), (
            "nft takes no overlaps"
        )
        for process in plan.values():
            for port in process.ports if process.place == host else ():
                assert any(first <= port.first and port.last <= last for first, last in bounds)
                if port.audience is not Audience.CLUSTER:
                    assert f"ip saddr @{port.audience} tcp dport {port.first} accept" in text


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs Debian's package systemd")
def test_systemd_finds_nothing_to_complain_about(tmp_path):
    """`verify` says most things on stderr only, with status 0."""
    files = render_hosts(
        loaded(tmp_path), list(on_hosts(tmp_path).values()), Options(Path(sys.executable), "root")
    )
    units = tmp_path / "units"
    units.mkdir()
    for name, text in files.items():
        host, _, file = name.partition("/")
        if file.endswith((".service", ".target")):
            (units / host).mkdir(exist_ok=True)
            (units / host / file).write_text(text)
    for host in units.iterdir():
        command = ["systemd-analyze", "verify", "--man=no", *sorted(map(str, host.iterdir()))]
        judged = subprocess.run(command, capture_output=True, text=True)
        assert (judged.returncode, judged.stderr) == (0, "")


@pytest.mark.skipif(
    shutil.which("nft") is None or os.geteuid() != 0, reason="needs Debian's package nftables, and root"
)
def test_nftables_takes_the_firewall_s_table(files, tmp_path):
    for host in ("gpu1", "gpu2", "mem1"):
        table = tmp_path / f"{host}.nft"
        table.write_text(files[f"{host}/firewall.nft"])
        # In a network namespace of its own: it is only checked, and could change nothing here.
        subprocess.run(["unshare", "--net", "nft", "--check", "--file", str(table)], check=True)


def test_the_installer_is_a_script_that_a_shell_can_read(files):
    for host in ("gpu1", "mem1"):
        subprocess.run(["sh", "-n"], input=files[f"{host}/install.sh"], text=True, check=True)


@pytest.mark.parametrize(
    "text", ["plain", "a b", '{"a": 1}', "50%", "$HOME", "back\\slash", "", "`date`", "it's"]
)
def test_words_survive_systemd_s_quoting(text):
    assert words(command_line(["x", text])) == ["x", text]
    name, _, value = "".join(shlex.split(environment_line("NAME", text))).partition("=")
    assert (name, value) == ("NAME", text)


def test_the_command_writes_it_and_says_what_is_next(tmp_path):
    description = tmp_path / "cluster.yaml"
    description.write_text(yaml.safe_dump(described()))
    out = tmp_path / "out"
    result = CliRunner().invoke(render_app, ["hosts", str(description), "--out", str(out)])
    assert result.exit_code == 0 and "install.sh" in result.output
    assert (out / "gpu1" / "install.sh").stat().st_mode & 0o111
    assert (out / "mem1" / "env" / "scheduler").is_file()


def test_the_command_names_what_is_missing(tmp_path):
    description = tmp_path / "cluster.yaml"
    description.write_text(yaml.safe_dump(described(mode="auto")))
    result = CliRunner().invoke(render_app, ["hosts", str(description), "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
