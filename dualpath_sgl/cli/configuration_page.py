"""docs/configuration.md, made of the models, commands and options that it describes.

python -m dualpath_sgl.cli.configuration_page docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_settings import BaseSettings
from typer.main import get_command, get_group

from dualpath_sgl.cli.__main__ import app
from dualpath_sgl.cli.lazy import PROGRAMS
from dualpath_sgl.launch.config import CLUSTERS
from dualpath_sgl.launch.config.cluster import ClusterConfig
from dualpath_sgl.relay import settings as relay_settings
from dualpath_sgl.relay.client import options as relay_options
from dualpath_sgl.router.settings import options
from dualpath_sgl.start.config import Settings

HEAD = """# Configuration

`make docs` makes this page out of the code; do not edit it by hand.

* [An engine](#an-engine): environment variables `DUALPATH_*`
* [A relay](#a-relay): environment variables `DUALPATH_RELAY_*`
* [Relays of a prefill engine](#relays-of-a-prefill-engine): in its backend's extra configuration
* [A cluster file](#a-cluster-file): what `dualpath up -c FILE` reads
* [The scheduler](#the-scheduler): its command line
* [The placing router](#the-placing-router): the options that it obeys
* [The command dualpath](#the-command-dualpath)
"""
ENGINE = """## An engine

Environment variables of one SGLang server. Unset `DUALPATH_ENABLED`, and SGLang runs as upstream does.
"""
RELAY = """## A relay

Environment variables of `python -m dualpath_sgl.relay` ([relays](relay.md)).
"""
RELAY_CLIENT = """## Relays of a prefill engine

Fields of `relay` in `--hicache-storage-backend-extra-config` of an engine with `DUALPATH_ENABLED=1`.
"""
CLUSTER = """## A cluster file

YAML. What is left out has its default; an unknown field is refused with the name that was probably meant.
`launch/clusters/` holds examples.
"""
SCHEDULER = """## The scheduler

`python -m scheduler_svc` with these options:
"""
ROUTER = """## The placing router

`python -m sglang_router.launch_router` with these options ([which router when](router.md)). Their defaults are
SGLang's. Every other option of the Rust router is refused by name when somebody sets it.
"""
REFUSED = """What to do instead of some refused options:
"""
COMMAND = """## The command dualpath

Every command answers `--help`.
"""


def page() -> str:
    """The whole page, Markdown."""
    parts = [HEAD, ENGINE, *_variables(Settings), RELAY, *_variables(relay_settings.Settings)]
    parts += [
        RELAY_CLIENT,
        _fields_table(relay_options.Options.model_json_schema()),
        CLUSTER,
        *_cluster(),
        SCHEDULER,
        *_scheduler(),
    ]
    parts += [ROUTER, *_router(), COMMAND, *_commands()]
    return "\n".join(parts)


def _variables(settings: type[BaseSettings]) -> Iterator[str]:
    schema, prefix = settings.model_json_schema(), settings.model_config["env_prefix"]
    rows = (
        (f"`{prefix}{name.upper()}`", _kind(field), _default(field), field["description"])
        for name, field in schema["properties"].items()
    )
    yield _table(("variable", "value", "default", "meaning"), rows)


def _cluster() -> Iterator[str]:
    schema = ClusterConfig.model_json_schema()
    yield _fields_table(schema)
    for title, section in _sections(schema, schema["$defs"], ""):
        yield f"### {title}\n\n{section.get('description', '')}\n".replace("\n\n\n", "\n")
        yield _fields_table(section)


def _sections(model: dict, defs: dict, inside: str) -> Iterator[tuple[str, dict]]:
    """Title and schema of each nested model, in the order of the fields; equal ones once."""
    found: dict[str, list[str]] = {}
    for name, field in model["properties"].items():
        for reference in _references(field):
            if "properties" in defs[reference]:
                found.setdefault(reference, []).append(inside + name)
    for reference, places in found.items():
        section = defs[reference]
        chosen = section["properties"].get("kind", {}).get("const")
        yield ", ".join(places) + (f", kind {chosen}" if chosen else ""), section
        yield from _sections(section, defs, f"{'/'.join(places)}.")


def _references(field: dict) -> Iterator[str]:
    for part in (field, *field.get("anyOf", ()), *field.get("oneOf", ())):
        for found in (part, *part.get("patternProperties", {}).values()):
            if "$ref" in found:
                yield found["$ref"].rsplit("/", 1)[-1]


def _fields_table(model: dict) -> str:
    required = model.get("required", ())
    rows = (
        (
            f"`{name}`",
            _kind(field),
            "must be given" if name in required else _default(field),
            field["description"],
        )
        for name, field in model["properties"].items()
    )
    return _table(("field", "value", "default", "meaning"), rows)


def _kind(field: dict) -> str:
    """What may stand there, in words."""
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if "anyOf" in field:
        return " or ".join(_kind(part) for part in field["anyOf"])
    if "$ref" in field:
        return _enum_values(field["$ref"].rsplit("/", 1)[-1])
    if "oneOf" in field:
        return "section"
    names = {"integer": "whole number", "boolean": "true or false", "array": "list", "object": "mapping"}
    kind = "path" if field.get("format") == "path" else names.get(field["type"], field["type"])
    return kind + _bounds(field)


def _enum_values(name: str) -> str:
    definition = ClusterConfig.model_json_schema()["$defs"][name]
    return _kind(definition) if "enum" in definition else "section"


def _bounds(field: dict) -> str:
    least, most, above = (field.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
    words = [f"above {above:g}"] if above is not None else []
    words += [f"from {least:,}"] if least is not None else []
    words += [f"to {most:,}"] if most is not None else []
    words += [f"in steps of {field['multipleOf']}"] if "multipleOf" in field else []
    return f", {' '.join(words)}" if words else ""


def _default(field: dict) -> str:
    if "default" not in field:
        return "none"
    value = field["default"]
    if value is None:
        return "none"
    if isinstance(value, dict) and value:
        # Only this default is not that of the section's own fields.
        return f"`ratio: {value['ratio']}`" if "ratio" in value else "its defaults"
    return "empty" if value in ("", [], {}) else f"`{json.dumps(value)}`".replace('"', "")


def _scheduler() -> Iterator[str]:
    from scheduler_svc.__main__ import serve

    program = typer.Typer(add_completion=False)
    program.command()(serve)
    yield _options_table(get_command(program).params)


def _router() -> Iterator[str]:
    from sglang_router.launch_router import parse_router_args
    from sglang_router.router_args import RouterArgs

    defaults = vars(parse_router_args([]))
    rows = (
        (f"`{options.flag(name)}`", _router_default(defaults[name]), meaning)
        for name, meaning in options.MEANING.items()
    )
    yield _table(("option", "default", "meaning"), rows)
    yield REFUSED
    order = [field.name for field in dataclasses.fields(RouterArgs) if field.name in options.INSTEAD]
    yield _table(("option", "instead"), ((f"`{options.flag(n)}`", options.INSTEAD[n]) for n in order))


def _router_default(value: object) -> str:
    return "" if value in (None, [], False) else f"`{value}`"


def _commands() -> Iterator[str]:
    own = get_command(app).params
    if own:
        yield _options_table(own)
    for name, command in sorted(commands().items()):
        yield from _command(f"dualpath {name}", command)


def commands() -> dict[str, Any]:
    """What may follow `dualpath`; those of the evaluations are imported for it."""
    lazy = {
        name: get_command(getattr(importlib.import_module(module), attribute))
        for name, (module, attribute, _) in PROGRAMS.items()
    }
    return {**get_group(app).commands, **lazy}


def _command(words: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for name, inner in sorted(command.commands.items()):
            yield from _command(f"{words} {name}", inner)
        return
    yield f"### {words}\n\n{inspect.cleandoc(command.help or '')}\n"
    if command.params:
        yield _options_table(command.params)


def _options_table(params: Iterable[Any]) -> str:
    rows = ((_names(param), _option_default(param), _meaning(param)) for param in params)
    return _table(("option", "default", "meaning"), rows)


def _names(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"`{param.metavar or param.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _meaning(param: Any) -> str:
    variable = f" Or `{param.envvar}`." if param.envvar else ""
    return (param.help or "") + variable


def _option_default(param: Any) -> str:
    if param.required:
        return "must be given"
    value = param.default
    if value is None or value is False or value == "" or callable(value):
        return ""
    if isinstance(value, Path) and value.is_relative_to(CLUSTERS):
        value = Path("launch/clusters") / value.name
    return f"`{value}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(' '.join(cell.replace('|', '&#124;').split()) for cell in cells)} |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def main(out: Annotated[Path, typer.Argument(help="Where the page goes.")]) -> None:
    """Write the page on configuration."""
    out.write_text(page())


if __name__ == "__main__":
    typer.run(main)
