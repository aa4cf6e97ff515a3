"""Synthetic documents: they contain exactly what is asked, and lengths, splits and seeds hold."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from apb_ds.tasks import SyntheticConfig, build_task_config
from apb_ds.tasks.synthetic import KINDS, Document, Recipe, generate, score
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.filler import NOISE, PLACES_OF, ROLES_OF, TEMPLATES_OF, TIMES_OF
from apb_ds.tasks.synthetic.lists import ListLayout
from apb_ds.tasks.synthetic.words import ADJECTIVES_OF, FIRST_SYLLABLES_OF, NOUNS_OF, number
from tests.tiny_checkpoint import byte_tokenizer
from tests.unit.smollm2 import smollm2_tokenizer

LENGTH = 6000  # letters, which `length` counts here
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
NUMBER = r"\b\d{7}\b"
UUID = r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"


def make(kind: str, seed: int = 0, num_tokens: int = LENGTH, **options: Any) -> Document:
    return generate(Recipe(kind=kind, **options), seed, num_tokens, len)


def fillers_of(kind: str) -> list[str | None]:
    return list(KINDS[kind].fillers) or [None]


CASES = [(kind, filler) for kind in KINDS for filler in fillers_of(kind)]


@pytest.mark.parametrize(("kind", "filler"), CASES)
def test_length_is_kept_and_nearly_filled(kind: str, filler: str | None) -> None:
    for num_tokens in (4000, LENGTH, 20000):
        text = make(kind, num_tokens=num_tokens, filler=filler).text
        assert num_tokens - 250 < len(text) <= num_tokens, len(text)


@ALL_KINDS
def test_the_same_from_the_same_seed(kind: str) -> None:
    assert make(kind, 3) == make(kind, 3)
    assert make(kind, 3).text != make(kind, 4).text
    assert make(kind, 3).questions != make(kind, 4).questions


@ALL_KINDS
def test_splits_share_no_word_that_is_asked_for(kind: str) -> None:
    train, evaluation = (make(kind, split=split, num_tokens=20000) for split in ("train", "eval"))
    assert train.text != evaluation.text
    for document, first in ((train, "train"), (evaluation, "eval")):
        syllable = "[BDFGKLMNPRSTVZ][AEIOU]"
        coded = re.findall(rf"\b(?:{syllable}){{3}}\b", document.text)
        if kind in ("frequent_words", "common_words"):  # only coded words
            coded = re.findall(r"\b[a-z]{6}\b", document.text.partition("\n\n")[2])
        if kind in ("frequent_words", "common_words", "variables"):
            assert len(coded) >= 10
            assert all(word[:2].lower() in FIRST_SYLLABLES_OF[first] for word in coded)
    assert not set(FIRST_SYLLABLES_OF["train"]) & set(FIRST_SYLLABLES_OF["eval"])
    for lists in (ADJECTIVES_OF, NOUNS_OF):
        assert not set(lists["train"]) & set(lists["eval"]) and min(map(len, lists.values())) >= 80


def test_splits_share_no_sentence() -> None:
    for of in (TEMPLATES_OF, ROLES_OF, PLACES_OF, TIMES_OF, NOISE):
        train, evaluation = of["train"], of["eval"]
        assert len({*train, *evaluation}) == len(train) + len(evaluation)
    assert sum(map(len, TEMPLATES_OF.values())) >= 60
    for filler in ("prose", "noise"):
        texts = (make("single", split=split, filler=filler, num_tokens=20000).text for split in ("train", "eval"))
        train, evaluation = (set(text.partition("\n\n")[2].split(". ")) for text in texts)
        assert not train & evaluation


@ALL_KINDS
def test_varied_words_say_the_same_in_many_ways(kind: str) -> None:
    plain = {line for line in make(kind, split="train").text.splitlines() if line}
    introductions, openings = set(), set()
    for seed in range(24):
        document = make(kind, seed, split="train", phrasing="varied", num_tokens=16000, num_questions=2)
        introductions.add(document.text.splitlines()[0])
        openings.add(document.questions[0].query.split()[0])
        assert not plain & set(document.text.splitlines())
        assert len(document.questions) == 2
        for question in document.questions:
            answers = question.answers
            assert len(set(answers)) == len(answers)
            assert all(re.search(rf"(?<!\w){answer}(?!\w)", document.text) for answer in answers)
            assert not any(answer in question.query + question.answer_prefix for answer in answers)
    assert len(introductions) >= 4 and len(openings) >= 2


@pytest.mark.parametrize("num_words", [3, 5])
def test_varied_lists_have_their_most_frequent_words(num_words: int) -> None:
    for seed in range(12):
        document = make("frequent_words", seed, split="train", phrasing="varied", num_words=num_words, num_tokens=20000)
        body = document.text.partition("\n\n")[2]
        counts = Counter(word for word in re.findall(r"[a-z]+", body))
        best = [word for word, _ in counts.most_common(num_words)]
        assert list(document.questions[0].answers) == best


def test_varied_words_are_for_training() -> None:
    with pytest.raises(ValueError, match=r"phrasing=varied is for task.split=train"):
        Recipe(phrasing="varied")


def test_splits_share_no_choice() -> None:
    """The same seed gives different values, at different depths."""
    depths, values = [], []
    for split in ("train", "eval"):
        documents = [make("single", seed, split=split, num_tokens=2500) for seed in range(20)]
        depths.append([asked_depth(document) for document in documents])
        values.append({document.questions[0].answers for document in documents})
    assert not values[0] & values[1]
    assert sum(abs(one - other) > 0.05 for one, other in zip(*depths, strict=True)) >= 10


def test_draws_stay_as_they_are() -> None:
    """In every version of Python: results from several machines are compared by seed."""
    draws = Draws("eval", 3)
    order = list(range(8))
    draws.shuffle(order)
    drawn = [draws.below(1000), draws.choose("abcdef"), draws.sample(1000, 3), draws.sample(4, 3), order]
    assert drawn == [552, "e", [969, 591, 980], [3, 2, 0], [2, 1, 7, 5, 6, 4, 0, 3]]
    assert number(Draws(0)) == "3594159"


@ALL_KINDS
def test_nothing_more_would_fit(kind: str) -> None:
    recipe = Recipe(kind=kind)
    tried: dict[str, int] = {}

    def length(text: str) -> int:
        tried[text] = len(text)
        return len(text)

    document = generate(recipe, 0, LENGTH, length)
    longer = sorted(num for num in tried.values() if num > LENGTH)
    shorter = max(num for num in tried.values() if num <= LENGTH)
    assert tried[document.text] == shorter
    # The shortest text that is too long has one unit more.
    assert longer and longer[0] - shorter < 160


@pytest.mark.parametrize(("kind", "filler"), [case for case in CASES if case[1]])
def test_a_key_is_named_only_where_it_is_meant(kind: str, filler: str) -> None:
    document = make(kind, filler=filler)
    (question,) = document.questions
    for answer in question.answers:
        # A variable occurs once where it is set and once where another is set to it, except for the chain's last.
        times = len(re.findall(rf"(?<!\w){answer}(?!\w)", document.text))
        assert times == 1 if kind != "variables" else times == 1 + (answer != question.answers[-1])
    things = re.findall(r"the ([a-z]+ [a-z]+ of [A-Z][a-z]+)", question.query)
    assert all(document.text.count(key) == (4 if kind == "multivalue" else 1) for key in things)


@pytest.mark.parametrize(("kind", "filler"), [case for case in CASES if case[0] in ("single", "multikey_words")])
def test_numbers_of_things(kind: str, filler: str | None) -> None:
    document = make(kind, filler=filler)
    kept = re.findall(r"[Tt]he number kept for the ([a-z]+ [a-z]+ of [A-Z][a-z]+) is (\d{7})\.", document.text)
    (question,) = document.questions
    (asked,) = re.findall(r"for the (.+)\?", question.query)
    assert [value for key, value in kept if key == asked] == list(question.answers)
    assert len({key for key, _ in kept}) == len(kept) == len({value for _, value in kept})
    assert len(kept) == 1 if kind == "single" else len(kept) >= 4
    assert question.answer_prefix == f"The number kept for the {asked} is"


@pytest.mark.parametrize("filler", KINDS["multikey_uuids"].fillers)
def test_codes(filler: str) -> None:
    document = make("multikey_uuids", filler=filler)
    kept = dict(re.findall(rf"The code kept for ({UUID}) is ({UUID})\.", document.text))
    (question,) = document.questions
    (asked,) = re.findall(UUID, question.query)
    assert question.answers == (kept[asked],) and len(kept) >= 4


@pytest.mark.parametrize("filler", KINDS["multivalue"].fillers)
def test_several_numbers(filler: str) -> None:
    document = make("multivalue", filler=filler, num_values=3)
    (question,) = document.questions
    (asked,) = re.findall(r"for the (.+)\? Name all", question.query)
    found = re.findall(rf"One number kept for the {asked} is (\d{{7}})\.", document.text)
    assert tuple(found) == question.answers and len(set(found)) == 3


@pytest.mark.parametrize("filler", KINDS["multiquery"].fillers)
def test_several_things(filler: str) -> None:
    document = make("multiquery", filler=filler, num_questions=2, num_keys=3)
    asked_before: set[str] = set()
    for question in document.questions:
        asked = re.findall(r"the ([a-z]+ [a-z]+ of [A-Z][a-z]+)", question.query)
        values = [re.findall(rf"[Tt]he number kept for the {key} is (\d{{7}})\.", document.text) for key in asked]
        assert [value for (value,) in values] == list(question.answers) and len(asked) == 3
        assert not asked_before & set(asked)
        asked_before |= set(asked)


@pytest.mark.parametrize("filler", KINDS["variables"].fillers)
def test_variables(filler: str) -> None:
    document = make("variables", filler=filler, num_hops=3)
    held: dict[str, str] = {}
    for name, source in re.findall(r"Set ([A-Z]{6}) to (\w+)\.", document.text):
        assert name not in held, "set twice"
        held[name] = source if source.isdigit() else held[source]  # KeyError if a variable is used before it is set
    (question,) = document.questions
    (value,) = re.findall(NUMBER, question.query)
    assert [name for name, found in held.items() if found == value] == list(question.answers)
    assert len(question.answers) == 4 and len(set(held.values())) >= 2


@pytest.mark.parametrize("kind", ["frequent_words", "common_words"])
@pytest.mark.parametrize("num_questions", [1, 2])
def test_most_frequent_words(kind: str, num_questions: int) -> None:
    document = make(kind, num_questions=num_questions, num_tokens=12000)
    lists = re.split(r"List \d+:\n", document.text.partition("\n\n")[2])
    lists = [text for text in lists if text.strip()]
    assert len(lists) == len(document.questions) == num_questions
    seen: set[str] = set()
    for text, question in zip(lists, document.questions, strict=True):
        counts = Counter(re.findall(r"\b[a-z]{6}\b", text))
        num = len(question.answers)
        ranked = counts.most_common()
        assert {word for word, _ in ranked[:num]} == set(question.answers)
        assert ranked[num - 1][1] >= ranked[num][1] + 2, "a clear margin"
        assert not seen & counts.keys()
        seen |= counts.keys()
    assert num == (3 if kind == "frequent_words" else 10)


@pytest.mark.parametrize("num_words", [1, 3, 6])
@pytest.mark.parametrize("exponent", [1.2, 2, 3])
def test_the_margin_holds_in_the_shortest_list(num_words: int, exponent: float) -> None:
    layout = ListLayout(Recipe(kind="frequent_words", num_words=num_words, exponent=exponent), ("eval", 0))
    for count in range(layout.minimum, layout.minimum + 20):
        words = layout.text(count).partition("\n\n")[2].split()
        ranked = Counter(words).most_common()
        assert len(words) == count and ranked[num_words - 1][1] >= ranked[num_words][1] + 2
        assert {word for word, _ in ranked[:num_words]} == set(layout.questions(count)[0].answers)


def asked_depth(document: Document) -> float:
    """Return the answer's position in the text after the task: 0 is its start, 1 its end."""
    body = document.text.partition("\n\n")[2]
    return body.index(document.questions[0].answers[0]) / len(body)


@pytest.mark.parametrize(("kind", "filler"), [("single", "prose"), ("multikey_words", "needles")])
def test_needles_asked_for_are_anywhere(kind: str, filler: str) -> None:
    """Depths are uniform: each fifth has a fifth of 300 documents, within four standard deviations of the count."""
    depths = [asked_depth(make(kind, seed, num_tokens=3000, filler=filler)) for seed in range(300)]
    fifths = Counter(int(depth * 5) for depth in depths)
    assert set(fifths) == set(range(5))
    assert all(abs(num - 60) < 4 * (300 * 0.2 * 0.8) ** 0.5 for num in fifths.values()), fifths


def test_frequent_and_common_words_are_spread_over_the_list() -> None:
    for kind in ("frequent_words", "common_words"):
        document = make(kind, num_tokens=20000)
        words = re.findall(r"\b[a-z]{6}\b", document.text.partition("\n\n")[2])
        places = [place for place, word in enumerate(words) if word == document.questions[0].answers[0]]
        assert abs(sum(places) / len(places) / len(words) - 0.5) < 4 * (1 / 12 / len(places)) ** 0.5


def test_values_cannot_be_guessed() -> None:
    first_digits = Counter(make("single", seed, num_tokens=1500).questions[0].answers[0][0] for seed in range(400))
    assert set(first_digits) == set("123456789") and max(first_digits.values()) < 80


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is 123.", ["123"], 1.0),
        ("It is 51234.", ["123"], 0.0),
        ("It is 5123.", ["123"], 0.0),
        ("It is 1234.", ["123"], 0.0),
        ("123, 456", ["123", "456"], 1.0),
        ("123", ["123", "456"], 0.5),
        ("KAVOMI and bedoru", ["kavomi", "BEDORU"], 1.0),
        ("kavomibedoru", ["kavomi"], 0.0),
        ("", ["1"], 0.0),
        ("a-b", ["a-b"], 1.0),
    ],
)
def test_score(prediction: str, answers: list[str], expected: float) -> None:
    assert score(prediction, answers) == expected


def test_a_score_needs_an_answer() -> None:
    with pytest.raises(ValueError, match="at least one"):
        score("x", [])


@ALL_KINDS
def test_samples(kind: str) -> None:
    tokenizer = byte_tokenizer()
    config = build_task_config({"name": "synthetic", "kind": kind, "num_tokens": 4000, "num_samples": 2})
    assert isinstance(config, SyntheticConfig)
    samples = list(config.samples(tokenizer, 260, 0))
    assert len(samples) == 2 and not torch.equal(samples[0].document_ids, samples[1].document_ids)
    for sample in samples:
        assert 3700 < sample.document_ids.shape[1] <= 4000
        assert sample.query_position == 2 and sample.labels == {"kind": kind, "length": 4000}
        perfect = " " + ", ".join(sample.answers) + "."
        assert len(tokenizer(perfect, add_special_tokens=False).input_ids) <= sample.max_new_tokens
        assert config.score(sample, perfect) == 1.0 and config.score(sample, "nothing") == 0.0
    again = list(config.samples(tokenizer, 260, 0))
    assert all(torch.equal(a.document_ids, b.document_ids) for a, b in zip(samples, again, strict=True))


def test_questions_about_one_document() -> None:
    config = SyntheticConfig(kind="multikey_words", num_tokens=3000, num_questions=3)
    samples = list(config.samples(byte_tokenizer(), 260, 0))
    assert len(samples) == 3 and len({sample.ground_truth for sample in samples}) == 3
    assert all(sample.document_ids is samples[0].document_ids for sample in samples)


def test_a_real_tokenizer_and_few_tokenisations() -> None:
    tokenizer, letters = smollm2_tokenizer(), 0

    class Counting:
        chat_template = tokenizer.chat_template

        def __call__(self, text: str, **options: Any) -> Any:
            nonlocal letters
            letters += len(text)
            return tokenizer(text, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    (sample,) = SyntheticConfig(kind="multikey_words", num_tokens=16000).samples(Counting(), 49152, 0)
    assert 15900 < sample.document_ids.shape[1] <= 16000
    text = tokenizer.decode(sample.document_ids[0])
    assert letters < 7 * len(text), letters / len(text)
    assert sample.ground_truth is not None and sample.ground_truth in text


def test_random_ids_without_a_tokenizer() -> None:
    samples = list(SyntheticConfig(num_tokens=50, num_samples=2).samples(None, 100, 0))
    assert [sample.document_ids.shape for sample in samples] == [(1, 50)] * 2
    assert samples[0].random_ids and SyntheticConfig().score(samples[0], "x") is None


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"kind": "singel"}, ["task.kind='singel'", "Did you mean 'single'?"]),
        ({"split": "test"}, ["task.split='test'", "train, eval"]),
        ({"num_questions": 0}, ["task.num_questions=0"]),
        ({"num_tokens": 0}, ["task.num_tokens=0"]),
        ({"num_samples": 1.5}, ["task.num_samples=1.5"]),
        ({"max_new_tokens": -1}, ["task.max_new_tokens=-1"]),
        ({"filler": "water"}, ["task.filler='water'", "prose, noise"]),
        ({"kind": "frequent_words", "filler": "prose"}, ["has no filler"]),
        ({"num_hops": 3}, ["task.num_hops=3", "no use to task.kind=single", "variables"]),
        ({"kind": "multikey_words", "num_needles": 9}, ["task.num_needles=9", "as many as fit"]),
        ({"kind": "multivalue", "num_needles": 1, "num_questions": 2}, ["at least the 2"]),
        ({"kind": "common_words", "common_times": 3}, ["task.common_times=3", "above"]),
        ({"kind": "frequent_words", "exponent": 1}, ["task.exponent=1", "above 1"]),
        ({"kind": "frequent_words", "num_words": 1000}, ["task.num_words=1000", "below 1000"]),
        ({"kind": "variables", "num_chains": 1, "num_questions": 2}, ["task.num_chains=1", "at least the 2"]),
        ({"kind": "multivalue", "num_values": 1}, ["task.num_values=1", "at least 2"]),
        ({"kind": "common_words", "rare_times": True}, ["task.rare_times=True", "at least 1"]),
        ({"kindd": "single"}, ["kindd", "Did you mean 'kind'?"]),
    ],
)
def test_bad_values(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        build_task_config({"name": "synthetic", **values})
    for part in parts:
        assert part in str(raised.value)


def test_too_short_to_hold_the_task() -> None:
    with pytest.raises(ValueError, match=r"task.num_tokens=50 cannot hold the task: at its shortest .* raise"):
        make("single", num_tokens=50)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("multivalue", {"num_values": 10**9}),
        ("variables", {"num_chains": 10**9}),
        ("variables", {"num_hops": 10**9, "filler": "needles"}),
        ("multiquery", {"num_questions": 10**9}),
        ("frequent_words", {"num_words": 900, "exponent": 8}),
        ("common_words", {"common_times": 10**9}),
    ],
)
def test_far_too_much_is_refused_before_a_text_is_made(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"task.num_tokens=6000 cannot hold the task: it needs \d{8,} needles or words"
    ):
        make(kind, **options)
