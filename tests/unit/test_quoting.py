"""Values on the command line: texts arrive as they were typed, and what Hydra cannot read is quoted for it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from launch.arguments import for_hydra, overrides_of


def read(*arguments: str) -> Any:
    """Return the value, or the values of a sweep, that Hydra reads in the last argument."""
    override = OverridesParser.create().parse_override(for_hydra(arguments)[-1])
    if override.is_sweep_override():
        return [plain(value) for value in override.sweep_iterator()]
    return override.value()


def plain(value: Any) -> Any:
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.text if isinstance(value, QuotedString) else value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("task.query=Où est-il? Wer & wann; 5% #1!", "Où est-il? Wer & wann; 5% #1!"),
        ("task.query=Who, and when?", "Who, and when?"),
        ("task.query=What's 'that'?", "What's 'that'?"),
        ('task.query="Who, and when?"', "Who, and when?"),
        ('task.query="One" or "two"', '"One" or "two"'),
        ("task.query=a=b=c", "a=b=c"),
        ("task.query=1.10", "1.10"),
        ("task.query=1_000", "1_000"),
        ("task.query=True", "True"),
        ("task.query=[1] says", "[1] says"),
        ("task.query=ends in \\", "ends in \\"),
        ("task.query= x ", " x "),
        ("task.query=", ""),
        ("task.query=null", None),
        ("+task.query=${oc.env:HOME,é}", "${oc.env:HOME,é}"),
        ("task.query=two\\nlines", "two\nlines"),
        ("task.query=\\\\nabla", "\\nabla"),
        ("task.document=1e3", "1e3"),
        ("task.document=@C\\notes\\two, three.txt", "@C\\notes\\two, three.txt"),
        ("task.document=@@home\\n", "@@home\n"),
        ("task.stop=\\n", "\n"),
        ('task.stop="\\n"', "\n"),
        ("task.stop='\\t'", "\t"),
        ("task.stop=1.10", "1.10"),
        ('task.stop=[\\n, User:,"a, b",1e3]', ["\n", "User:", "a, b", "1e3"]),
        ("task.stop=[INST", "[INST"),
    ],
)
def test_texts(typed: str, value: Any) -> None:
    assert read(typed) == value


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("model.path=/data/modèles #1", "/data/modèles #1"),
        ("model.path=/data/run=3/Bob's (1)", "/data/run=3/Bob's (1)"),
        ("model.path='/data/é'", "/data/é"),
        ("hydra.run.dir=a\\,ü", "a,ü"),
        ("task.texts=[a,ü,'b, c']", ["a", "ü", "b, c"]),
        ("model.overrides={name: ü, size: 2}", {"name": "ü", "size": 2}),
        ("bench.settings={apb: {note: [ü, 1]}}", {"apb": {"note": ["ü", 1]}}),
        ("method.hosts=4", 4),
        ("method.compression_ratio=1e1", 10.0),
        ("method.hosts=null", None),
    ],
)
def test_other_values(typed: str, value: Any) -> None:
    assert read(typed) == value


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("task.query=Who?, Où?", ["Who?", "Où?"]),
        ("task.query=Who\\, and when?,1.10", ["Who, and when?", "1.10"]),
        ('task.query="Who, and when?",What\'s up?', ["Who, and when?", "What's up?"]),
        ("task.query=choice(Où,1.10)", ["Où", "1.10"]),
        ("task.stop=[a,b],\\n", [["a", "b"], "\n"]),
        ("model.path=/a/é,/b", ["/a/é", "/b"]),
        ("method.hosts=2,4", [2, 4]),
    ],
)
@pytest.mark.parametrize("flag", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_sweeps(flag: str, typed: str, values: list[Any]) -> None:
    assert read(flag, typed) == values


def test_any_text_arrives_whole() -> None:
    generator = random.Random(0)
    for _ in range(500):
        text = "x" + "".join(generator.choices("ab \\\"'[](){},:=!#é\n.$@-&;%", k=8))
        assert read(f"task.query={text}") == text
        assert overrides_of(for_hydra([f"task.query={text}"])) == {"task.query": text.replace("\n", "\\n")}


@pytest.mark.parametrize("argument", ["--cfg", "-sc", "~task.query", "tösk=1", "x={é: 1}", "x=[a", "foo", "=1"])
def test_what_quotes_do_not_help_stays(argument: str) -> None:
    assert for_hydra([argument]) == [argument]


def test_overrides_are_kept_as_typed() -> None:
    typed = ["task.query=Où?", "+method.hosts=2", "task.stop=\\n"]
    assert overrides_of(for_hydra(typed)) == {"task.query": "Où?", "method.hosts": "2", "task.stop": "\\n"}
