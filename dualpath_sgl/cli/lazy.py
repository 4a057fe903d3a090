"""Commands whose programs are imported when they are called: help and completion of the rest stay quick."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_group


class Program(NamedTuple):
    module: str
    app: str
    """Name of its typer app there."""
    help: str


PROGRAMS = {
    "render": Program(
        "dualpath_sgl.launch.render.command",
        "render_app",
        "Write what other hosts, or Kubernetes, need to run a cluster.",
    ),
    "eval": Program("dualpath_sgl.evals.cli", "eval_app", "Replay agent traces and compare modes."),
    "sim": Program(
        "dualpath_sgl.evals.sim.studies.command", "sim_app", "Simulate clusters that are not at hand."
    ),
    "trace": Program("dualpath_sgl.evals.spans.command", "trace_app", "Look at recorded request traces."),
}
"""They import much that the other commands do not need."""


class LazyGroup(TyperGroup):
    """Lists the programs by name and help; one that is called, or whose words are completed, is loaded."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in PROGRAMS:
            program = PROGRAMS[name]
            command = get_group(getattr(importlib.import_module(program.module), program.app))
        return name, command, rest


def add_programs(app: typer.Typer) -> None:
    app.info.cls = LazyGroup
    for name, program in PROGRAMS.items():
        app.add_typer(typer.Typer(), name=name, help=program.help)
