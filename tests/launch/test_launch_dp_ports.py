"""A server with DP attention listens beside its HTTP port, on ports that nobody told the launcher."""

from dualpath_sgl.launch.processes.ports import DP_ATTENTION_OFFSETS, FreePorts


def test_what_sglang_derives_from_a_servers_port_is_nobody_elses():
    ports = FreePorts("127.0.0.1")
    servers = [ports.take(DP_ATTENTION_OFFSETS) for _ in range(20)]
    others = [ports.take() for _ in range(500)]
    derived = [server + offset for server in servers for offset in DP_ATTENTION_OFFSETS]
    drawn = servers + others + derived
    assert len(drawn) == len(set(drawn))


def test_the_derived_ports_are_those_of_the_pinned_sglang():
    from sglang.srt import server_args

    handshake, base = server_args.DP_ATTENTION_HANDSHAKE_PORT_DELTA, server_args.ZMQ_TCP_PORT_DELTA
    assert {handshake, *range(base, base + 8)} == set(DP_ATTENTION_OFFSETS)
