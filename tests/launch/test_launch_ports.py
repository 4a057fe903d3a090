"""Ports are drawn long before they are bound."""

from dualpath_sgl.launch.processes import ports


def test_a_port_is_drawn_once_whoever_asks(monkeypatch):
    monkeypatch.setattr(ports, "LOWEST", 17400)
    monkeypatch.setattr(ports, "HIGHEST", 17408)
    first, second = ports.FreePorts("127.0.0.1"), ports.FreePorts("127.0.0.1")
    drawn = []
    try:
        while True:
            drawn += [first.take(), second.take()]
    except OSError as error:
        assert "no free port on 127.0.0.1" in str(error)
    assert drawn and len(drawn) == len(set(drawn))
