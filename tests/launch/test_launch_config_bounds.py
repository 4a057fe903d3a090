"""Cluster files that were damaged, written by a program, or meant ill: one short answer, at once."""

from pathlib import Path

import pytest

from dualpath_sgl.launch.config.cluster import ConfigError, load

SMALL = "name: t\ndevice: cpu\n"
LONGEST_ANSWER_CHARS = 9000


def refusal(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load(path)
    answer = str(caught.value)
    assert len(answer) <= LONGEST_ANSWER_CHARS + 20 * len(str(path))
    assert all(character.isprintable() or character == "\n" for character in answer)
    assert answer.startswith(str(path))
    return answer


def doubling(levels: int, line: str, more: str) -> str:
    """`levels` values, each of which holds the one before nine times."""
    lines = [line]
    for level in range(levels):
        nine = ", ".join([f"*v{level}"] * 9)
        lines.append(more.format(name=f"v{level + 1}", nine=nine))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("first", "more"),
    [
        ("v0: &v0 [x, x, x]", "{name}: &{name} [{nine}]"),
        ("v0: &v0 {{x: x}}", "{name}: &{name} {{{{<<: [{nine}]}}}}"),
        ("v0: &v0 {{x: x}}", "{name}: &{name} {{{{a: [{nine}]}}}}"),
    ],
)
@pytest.mark.parametrize("levels", [5, 9, 200])
def test_aliases_that_multiply_are_refused_before_they_do(tmp_path, levels, first, more):
    text = SMALL + doubling(levels, first.format(), more.replace("{{{{", "{{").replace("}}}}", "}}"))
    assert "more than 20000 values with every alias written out" in refusal(tmp_path, text)


def test_an_alias_and_a_merge_in_their_places_are_welcome(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(SMALL + "prefill: &group {count: 2, extra_args: [--x]}\ndecode: {<<: *group, count: 3}\n")
    config = load(path)
    assert (config.decode.count, config.decode.extra_args) == (3, ("--x",))


@pytest.mark.parametrize("opened", ["[", "{a: ", "? - ", "[{a: "])
def test_deep_nesting_is_refused_with_its_place(tmp_path, opened):
    assert "nested more than 16 deep" in refusal(tmp_path, SMALL + "x:\n  " + opened * 3000)


def test_a_value_that_contains_itself_is_refused(tmp_path):
    assert "line 3, column 4: contains itself" in refusal(tmp_path, SMALL + "x: &x [*x]")
    assert "contains itself" in refusal(tmp_path, SMALL + "x: &x {y: {z: *x}}")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("name: a\nname: b\ndevice: cpu\n", "line 2, column 1: 'name' is given twice: keep one of them"),
        (SMALL + "prefill: {count: 1, 'count': 2}", "'count' is given twice"),
        (SMALL + "1: 2", "the name '1' is not text: put it in quotes"),
        (SMALL + "~: 2", "the name '~' is not text"),
        (SMALL + "yes: 2", "the name 'yes' is not text"),
        (SMALL + "? [a]\n: 2", "is not text"),
        (SMALL + "page_size: " + "9" * 5000, "line 3, column 12: not a value"),
        (SMALL + "page_size: 0x" + "f" * 5000, "an integer of more than 64 bits"),
        (SMALL + "page_size: 1" + "0" * 40, "an integer of more than 64 bits"),
        (SMALL + "x: 2001-99-99", "not a value: month must be in 1..12"),
        (SMALL + "x: !!python/object/apply:os.system [ls]", "not YAML: line 3"),
        (SMALL + "x: *nowhere", "undefined alias"),
        (SMALL + "---\n" + SMALL, "not YAML: line 3"),
        (b"name: \xff\n", "byte 6 is not UTF-8"),
        (b"name: a\x00b\n", "not YAML"),
        (b"name: a\x1b[31mb\n", "not YAML"),
        (b"\x00" * 100, "not YAML"),
        ("x: " + "y" * 300_000, "longer than 262144 bytes"),
        ("", "must be a mapping of fields, got NoneType"),
        ("just text", "must be a mapping of fields, got str"),
    ],
)
def test_what_no_description_needs_is_refused_with_its_place(tmp_path, text, answer):
    assert answer in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("fields", "answer"),
    [
        ("prefill: {host_pool: {ratio: .inf}}", "prefill.host_pool.ratio: got inf; input should be a finite"),
        ("prefill: {host_pool: {ratio: .nan}}", "prefill.host_pool.ratio: got nan"),
        ("prefill: {host_pool: {ratio: 1.0e+300}}", "prefill.host_pool.ratio: got 1e+300"),
        ("prefill: {host_pool: {size_gb: 1000000000}}", "prefill.host_pool.size_gb: got 1000000000"),
        ("decode: {max_total_tokens: 9223372036854775807}", "decode.max_total_tokens: got 922337203685477"),
        ("store: {segment_bytes: 9223372036854775807}", "store.segment_bytes: got"),
        ("store: {read_rate: 99999999999999999999999999gbit}", "store.read_rate: got"),
        ("store: {read_rate: 999999999gbit}", "from 1kbit to 100000gbit"),
        ("store: {read_rate: 0.000000001kbit}", "from 1kbit to 100000gbit"),
        ("store: {read_rate: ٤mbit}", "store.read_rate: got"),
        (
            "tracing: {otlp_endpoint: 'h:99999999'}",
            "tracing.otlp_endpoint: got 'h:99999999'; a host and a port",
        ),
        ("tracing: {otlp_endpoint: 'h:0'}", "tracing.otlp_endpoint: got 'h:0'"),
        ("tracing: {otlp_endpoint: 'h:٤٣١٧'}", "tracing.otlp_endpoint: got"),
        ("tracing: {otlp_endpoint: '--help:1'}", "tracing.otlp_endpoint: got '--help:1'"),
        ("tracing: {otlp_endpoint: '::1:4317'}", "tracing.otlp_endpoint: got"),
        ("prefill: {env: {'A=B': c}}", "prefill.env.A=B.[key]: got 'A=B'; is no name of an environment"),
        ("prefill: {env: {'': c}}", "is no name of an environment variable"),
        ("prefill: {env: {'A B': c}}", "is no name of an environment variable"),
        ('prefill: {env: {"A\\0": c}}', "is no name of an environment variable"),
        ('prefill: {env: {A: "c\\0d"}}', "prefill.env.A: got 'c\\x00d'; holds a control character"),
        ("prefill: {env: {A: 1}}", "prefill.env.A: got 1; input should be a valid string: put it in quotes"),
        ("prefill: {env: {A: no}}", "put it in quotes"),
        ('decode: {extra_args: ["--x=\\0"]}', "decode.extra_args.0: got '--x=\\x00'; holds a control"),
        ('decode: {extra_args: ["\\e[31m"]}', "holds a control character"),
        ('decode: {extra_args: ["\\ud800"]}', "line 3, column 23: half of a character"),
        ('"\\ud800": 1', "half of a character"),
        ('"\\e[31mred": 1', "unknown field"),
        ("name: " + "a" * 10_000, "name: "),
        ("? " + "x" * 3000 + "\n: 1", "unknown field"),
        ("page_size: " + "x" * 10_000, "page_size: got 'xxx"),
        ("page_size: {a: [1, 2, {b: c}]}", "page_size: "),
        ("model: {kind: " + "k" * 3000 + "}", "model: "),
        ("device: [" + ", ".join(["cpu"] * 500) + "]", "device: got ['cpu'"),
    ],
)
def test_a_value_no_part_could_take_is_refused_with_field_and_remedy(tmp_path, fields, answer):
    base = SMALL.replace("name: t\n", "") if fields.startswith("name") else SMALL
    base = base.replace("device: cpu\n", "") if fields.startswith("device") else base
    assert answer in refusal(tmp_path, base + fields + "\n")


def test_very_many_problems_are_counted_after_the_first_twenty(tmp_path):
    fields = "".join(f"field{number}: 1\n" for number in range(500))
    answer = refusal(tmp_path, SMALL + fields)
    assert answer.count("unknown field") == 20
    assert "and 480 problems more" in answer


def test_arguments_may_hold_json_over_several_lines(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(SMALL + 'prefill:\n  extra_args:\n    - |\n      --x={"a":\n      \t"b"}\n')
    assert load(path).prefill.extra_args == ('--x={"a":\n\t"b"}\n',)
