"""Words as systemd reads them: systemd.service(5), "COMMAND LINES", and systemd.exec(5), `EnvironmentFile=`."""

from __future__ import annotations

from collections.abc import Iterable

_IN_QUOTES = str.maketrans({"\\": "\\\\", '"': '\\"'})
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:=,@+-")


def command_line(argv: Iterable[str]) -> str:
    """For `ExecStart=`: quoted, and neither a specifier (%) nor a variable ($) in it."""
    return " ".join(_word(word) for word in argv)


def _word(word: str) -> str:
    escaped = word.replace("%", "%%").replace("$", "$$")
    if word and _PLAIN.issuperset(word):
        return escaped
    return f'"{escaped.translate(_IN_QUOTES)}"'


def environment_line(name: str, value: str) -> str:
    """For an environment file; nothing in it is expanded."""
    if value and _PLAIN.issuperset(value):
        return f"{name}={value}"
    return f'{name}="{value.translate(_IN_QUOTES)}"'
