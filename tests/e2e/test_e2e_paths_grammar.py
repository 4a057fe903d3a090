"""Grammars through the router: the answer obeys its schema and is the single server's.

Named so that the cluster of the modules around it serves it.
"""

from __future__ import annotations

import json
import re

import pytest
from grammars import REGEX, SCHEMA, SUM, ask, questions, told

PATTERNS = {"regex": REGEX, "ebnf": SUM}


@pytest.mark.parametrize("name", ["schema", "tool", "regex", "ebnf"])
def test_an_answer_bound_by_a_grammar_obeys_it_and_is_the_single_servers(cluster, grammar_reference, name):
    answer = told(ask(cluster.url, *questions()[name]))
    if name in PATTERNS:
        assert re.fullmatch(PATTERNS[name], answer)
    else:
        value = json.loads(answer)
        # Without a parser of this model's own tool calls SGLang leaves them in the text.
        person = value[0]["parameters"] if name == "tool" else value
        assert set(person) == set(SCHEMA["properties"])
    assert answer == grammar_reference[name]
