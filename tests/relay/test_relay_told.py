"""An engine rank in relay mode with SGLang's own tree, controller and threads: the scheduler tells it of a relay, it
tells the scheduler of a request and of its load.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from sglang_tree import Tree
from test_relay_scheduler import scheduler_of

from dualpath_sgl import plugin, relay_engine
from dualpath_sgl.cpu_profile.plugin import activate
from dualpath_sgl.evals.relay.world import HOST, eventually
from dualpath_sgl.relay.client.relays import Relays
from dualpath_sgl.start.config import settings
from scheduler_svc.wire.client import SchedulerClient
from scheduler_svc.wire.protocol import Heartbeat as Beat
from scheduler_svc.wire.protocol import Helper, Helpers, Mode, Plan, RankInfo, Report, Role

PAGE = 16
TOKENS = 1024
ROOM = 7
WAIT_S = 30.0


@pytest.fixture
def scheduler(own_fresh_process):
    with scheduler_of() as scheduler:
        yield scheduler


def sglangs_scheduler(tree) -> SimpleNamespace:
    """What its loop would hold; its methods are called with it."""
    return SimpleNamespace(
        tree_cache=tree,
        enable_hicache_storage=True,
        enable_lmcache=False,
        token_to_kv_pool_allocator=tree.token_to_kv_pool_allocator,
        page_size=PAGE,
        waiting_queue=[],
        processed_tokens_counter=0,
        enable_overlap=False,
    )


def request(prompt: list[int]):
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    req = Req("request-1", "", array("q", prompt), SamplingParams(max_new_tokens=4), bootstrap_host=HOST,
              bootstrap_room=ROOM)  # fmt: skip
    req.full_untruncated_fill_ids = req.origin_input_ids
    return req


def plan_for_a_decode_engine(address: str) -> Plan:
    """What one at the other end of the room is told."""
    with SchedulerClient(address) as decode:
        decode.send(
            Beat(
                engine=RankInfo(
                    engine_id="d0", role=Role.DECODE, url="http://127.0.0.1:1", fingerprint="f",
                    page_size=PAGE, page_bytes=1, page_endpoint="tcp://127.0.0.1:1",
                ),
            )
        )  # fmt: skip
        decode.send(
            Report(room=ROOM, engine_id="d0", role=Role.DECODE, prompt_tokens=TOKENS + 1, local_pages=0)
        )
        plan = decode.receive(WAIT_S)
    assert isinstance(plan, Plan), plan
    return plan


def test_a_relay_that_the_scheduler_tells_of_helps_and_the_scheduler_hears_of_the_request(
    scheduler, scene, monkeypatch
):
    for name, value in {
        "DUALPATH_ENABLED": "1",
        "DUALPATH_MODE": "relay",
        "DUALPATH_ENGINE_ID": "p0",
        "DUALPATH_SCHEDULER": scheduler.address,
        "MOONCAKE_MASTER": scene.store.master,
        "MOONCAKE_PROTOCOL": "tcp",
        "MOONCAKE_TE_META_DATA_SERVER": "P2PHANDSHAKE",
        "MOONCAKE_GLOBAL_SEGMENT_SIZE": "0",
        "MOONCAKE_LOCAL_HOSTNAME": HOST,
    }.items():
        monkeypatch.setenv(name, value)
    options = {"least_call_bytes": 0, "bounce_bytes": 16 * 2**20}
    plugin.activate()
    activate()
    from sglang.srt.utils import common

    common.is_cpu.cache_clear()  # other tests import SGLang as for a GPU
    from sglang.srt.managers.scheduler import Scheduler as SGLangScheduler
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_parallel

    HookRegistry.apply_hooks()
    tree = Tree("full", PAGE, "mooncake", {"relay": options})
    loop = sglangs_scheduler(tree.tree)
    with get_parallel().override(attn_cp_rank=0, attn_dp_rank=0, dp_rank=0):
        engine = relay_engine.start(settings(), loop)
    scene.relay("relay-a", scheduler=scheduler.address)
    loader = tree.backend.loader
    eventually(lambda: [lane.helper.name for lane in loader.lanes_up()] == ["relay-a"], "it may be asked")

    prompt = list(range(1000, 1000 + TOKENS))
    tree.store_holds(prompt)
    tree.relays_come_first()
    req = request([*prompt, 1])
    SGLangScheduler._prefetch_kvcache(loop, req)
    handle = req.cache_request_handle
    assert tree.tree.has_ongoing_prefetch(handle)
    assert engine.workload().sequences == 1
    tree.ends(handle)
    assert tree.wrong() == [] and loader.counts.relay_bytes > 0

    plan = plan_for_a_decode_engine(scheduler.address)
    assert (plan.hit_pages, plan.split_page, plan.prefill_id) == (TOKENS // PAGE, 0, "p0")
    tree.tree.check_hicache_events()
    load = engine.workload()
    assert load.read_queue_bytes == 0 and load.faults == 0
    assert load.device_free_tokens > 0 and load.read_rate_bytes_per_s > 0
    engine.prefill.ended(req.rid)
    with SchedulerClient(scheduler.address) as client:
        (prefill,) = [one for one in client.status(10).engines if one.engine.role is Role.PREFILL]
    assert (prefill.engine.mode, prefill.engine.page_size) == (Mode.RELAY, PAGE)
    assert prefill.engine.page_bytes > 1
    assert prefill.engine.objects == tree.backend.objects is not None


def test_a_loader_follows_what_is_told_until_it_is_closed(scene):
    relay = scene.relay("relay-a")
    relays = Relays()
    relays.take(Helpers((Helper(relay.name, relay.endpoint, 0.5),)))
    prefill = scene.prefill_of([])
    relays.follow(prefill.loader._follow)
    prefill.knows(relay)
    assert relays.share("relay-a") == 0.5 and relays.share("another") == 1.0
    relays.unfollow(prefill.loader._follow)
    relays.take(Helpers())
    assert [lane.helper.name for lane in prefill.loader.lanes_up()] == ["relay-a"], "it follows no more"
