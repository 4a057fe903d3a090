"""Reads one small YAML file that somebody wrote by hand, within bounds.

What YAML allows and a description never needs is refused with its line: aliases that multiply, cycles,
deep nesting, two equal keys, numbers that no field could take.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16
MAX_VALUES = 20_000
"""With every alias written out."""
MAX_INTEGER_BITS = 64


class YamlProblem(ValueError):
    """What is wrong with the text, with its line where there is one; at most a few hundred characters."""


def read(path: Path) -> object:
    """The document's value.  Raises YamlProblem, or OSError when the file cannot be read."""
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise YamlProblem(f"longer than {MAX_BYTES} bytes; is it a cluster description?")
    try:
        return _value(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise YamlProblem(f"byte {error.start} is not UTF-8; save it as UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        problem = _problem(error.problem_mark or error.context_mark, error.problem or "cannot be read")
        raise YamlProblem(f"not YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise YamlProblem(f"not YAML: {' '.join(str(error).split())[:200]}") from None


def _value(text: str) -> object:
    _bound_depth(text)
    loader = _Loader(text)
    root = loader.get_single_node()
    if root is None:
        return None
    _expanded_size(root, {})
    return loader.construct_document(root)


def _bound_depth(text: str) -> None:
    """Refuse deep nesting before nodes are made: PyYAML's events come without recursion, its nodes do not."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _problem(event.start_mark, f"nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Values in `node` once every alias is written out; `sizes`: of the nodes seen, None of open ones."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _problem(node.start_mark, "contains itself")
        return size
    sizes[id(node)] = None
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_names([key for key, _ in node.value])
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    size = 1 + sum(_expanded_size(child, sizes) for child in children)
    if size > MAX_VALUES:
        raise _problem(node.start_mark, f"more than {MAX_VALUES} values with every alias written out")
    sizes[id(node)] = size
    return size


def _check_names(names: list[yaml.Node]) -> None:
    given = set()
    for node in names:
        if node.tag == "tag:yaml.org,2002:merge":
            continue
        if node.tag != "tag:yaml.org,2002:str":
            raise _problem(node.start_mark, f"the name {_short(node.value)} is not text: put it in quotes")
        if node.value in given:
            raise _problem(node.start_mark, f"{_short(node.value)} is given twice: keep one of them")
        given.add(node.value)


class _Loader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        try:
            value = super().construct_object(node, deep=deep)
        except YamlProblem:
            raise
        except (ValueError, OverflowError, TypeError) as error:
            raise _problem(node.start_mark, f"not a value: {error}") from None
        if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise _problem(node.start_mark, f"an integer of more than {MAX_INTEGER_BITS} bits")
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise _problem(node.start_mark, "half of a character (a surrogate)")
        return value


class _Mark(Protocol):
    """PyYAML has two classes of them, counting from 0."""

    line: int
    column: int


def _problem(mark: _Mark | None, problem: str) -> YamlProblem:
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    return YamlProblem(f"{where}{problem[:200]}")


def _short(value: object) -> str:
    return repr(value)[:80]
