"""The CPU stand-ins: copies against plain indexing, plugin switches, import order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dualpath_sgl.cpu_profile.install import SITE, install

sys.path.append(str(SITE))
from sgl_kernel import assign_req_to_token_pool_cpu, kvcacheio

LAYERS, PAGE_TOKENS, PAGES, HEADS, DIM = 3, 4, 6, 2, 8
SLOTS = PAGES * PAGE_TOKENS


def pages_to_slots(pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS) for page in pages])


page_lists = st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=PAGES, unique=True)


@given(st.data(), st.sampled_from([1, 2]))
def test_pages_survive_the_way_to_the_host_and_back(data, halves):
    """`halves`: K and V (2), or MLA's single tensor (1)."""
    device_pages = data.draw(page_lists)
    host_pages = data.draw(st.permutations(range(PAGES)))[: len(device_pages)]
    source = [torch.randn(SLOTS, HEADS, DIM) for _ in range(halves * LAYERS)]
    host = [torch.zeros(PAGES, LAYERS, PAGE_TOKENS, HEADS, DIM) for _ in range(halves)]
    device_slots, host_slots = pages_to_slots(device_pages), pages_to_slots(host_pages)
    kvcacheio.transfer_kv_all_layer_direct_lf_pf(source, host, device_slots, host_slots, PAGE_TOKENS)
    for half in range(halves):
        for device_page, host_page in zip(device_pages, host_pages, strict=True):
            for layer in range(LAYERS):
                there = source[half * LAYERS + layer][pages_to_slots([device_page])]
                assert torch.equal(host[half][host_page, layer], there)
    for layer in range(LAYERS):
        back = [torch.zeros(SLOTS, HEADS, DIM) for _ in range(halves)]
        kvcacheio.transfer_kv_per_layer_direct_pf_lf(host, back, host_slots, device_slots, layer, PAGE_TOKENS)
        for half in range(halves):
            assert torch.equal(back[half][device_slots], source[half * LAYERS + layer][device_slots])


@given(st.data())
def test_pages_move_between_layer_first_buffers(data):
    from_pages = data.draw(page_lists)
    to_pages = data.draw(st.permutations(range(PAGES)))[: len(from_pages)]
    source = [torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    moved = [torch.zeros(SLOTS, HEADS, DIM) for _ in range(LAYERS)]
    from_slots, to_slots = pages_to_slots(from_pages), pages_to_slots(to_pages)
    kvcacheio.transfer_kv_direct(source, moved, from_slots, to_slots, PAGE_TOKENS)
    for layer in range(LAYERS):
        expected = torch.zeros(SLOTS, HEADS, DIM)
        expected[to_slots] = source[layer][from_slots]
        assert torch.equal(moved[layer], expected)


def test_a_kernel_without_stand_in_imports_but_refuses_to_run():
    with pytest.raises(NotImplementedError, match="use --hicache-io-backend direct"):
        kvcacheio.transfer_kv_per_layer()
    with pytest.raises(AttributeError):
        kvcacheio.something_else  # noqa: B018


def test_new_slots_land_in_each_requests_row():
    table = torch.zeros(3, 6, dtype=torch.int32)
    assign_req_to_token_pool_cpu(
        torch.tensor([2, 0]),
        table,
        torch.tensor([1, 0]),
        torch.tensor([3, 2]),
        torch.tensor([7, 8, 9, 10]),
        6,
    )
    assert table.tolist() == [[9, 10, 0, 0, 0, 0], [0] * 6, [0, 7, 8, 0, 0, 0]]


def test_a_real_sgl_kernel_is_never_shadowed(tmp_path: Path):
    install(tmp_path)
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel" / "__init__.py").write_text("real = True")
    code = f"import site; site.addsitedir({str(tmp_path)!r}); import sgl_kernel; print(sgl_kernel.real)"
    result = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


def run_engine(code: str, **switches: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(SITE), **switches}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


LOAD_FAILS = """
import sglang.srt.plugins as plugins
from importlib.metadata import EntryPoint
broken = EntryPoint("dualpath_cpu", "dualpath_sgl.cpu_profile.absent:activate", "sglang.srt.plugins")
plugins.entry_points = lambda group: [broken]
import runpy
runpy.run_module("dualpath_sgl.launch.engine", run_name="__mp_main__")  # As in a spawned child of an engine.
print("went on")
"""


def test_an_engine_process_whose_plugin_fails_stops_and_says_so():
    """SGLang itself only logs the failure and would go on."""
    result = run_engine(LOAD_FAILS, SGLANG_USE_CPU_ENGINE="1", DUALPATH_ENABLED="0")
    assert result.returncode == 1
    assert "went on" not in result.stdout
    assert "plugin dualpath_sgl.cpu_profile.plugin did not run" in result.stderr


def test_an_engine_process_needs_no_plugin_that_is_switched_off():
    result = run_engine(LOAD_FAILS, SGLANG_USE_CPU_ENGINE="0", DUALPATH_ENABLED="0")
    assert (result.returncode, result.stdout) == (0, "went on\n"), result.stderr


POOL = """
from dualpath_sgl.cpu_profile.plugin import HOST_RESERVE_BYTES, activate
from sglang.srt.mem_cache.pool_host import base
activate()
free = base.available_host_memory_bytes()
print(free - base.host_memory_budget_bytes() <= HOST_RESERVE_BYTES + (1 << 29) < 10 << 30)
"""


def test_host_pools_need_no_ten_gibibytes_beside_them_on_a_cpu():
    result = run_engine(POOL, SGLANG_USE_CPU_ENGINE="1", DUALPATH_ENABLED="0")
    assert result.stdout.splitlines()[-1:] == ["True"], result.stderr
