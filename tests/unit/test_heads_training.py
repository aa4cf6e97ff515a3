"""Training heads: labels, the loss, metrics, texts, conversations, settings."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from torch import Tensor
from transformers import AttentionInterface

from apb_ds.compressors.retaining_heads import RetainingHeads
from apb_ds.config import from_mapping
from apb_ds.loading import ModelConfig
from apb_ds.loading.heads import head_sizes
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.report.progress import steps_progress
from apb_ds.tasks.fidelity import STANDARD_TEXTS
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.training.batches import Batches, Example, Lengths, pad_examples
from apb_ds.training.heads import texts as texts_module
from apb_ds.training.heads.config import HeadsConfig
from apb_ds.training.heads.examples import ExampleMaker
from apb_ds.training.heads.labels import LabelKind, View, attention_received, label_tokens, make_view
from apb_ds.training.heads.metrics import _kept_mass, _overlap, measure, measure_all
from apb_ds.training.heads.module import HeadsLoss
from apb_ds.training.heads.observe import NAME, observe_layers
from apb_ds.training.heads.sharegpt import ShareGPT
from apb_ds.training.heads.texts import TextFiller, find_texts, places_of, read_pieces, split_texts
from apb_ds.training.loop import load_batches
from apb_ds.training.mixture import Mixture
from tests.models import build_model, distinct_ids
from tests.tiny_checkpoint import TEMPLATE, byte_tokenizer

HEADS, KV_HEADS, TOKENS, HEAD_DIM, SCALE = 4, 2, 30, 8, 0.3
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
REDUCED: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "mean": lambda values: math.fsum(values) / len(values),
    "logmeanexp": lambda values: math.log(math.fsum(map(math.exp, values)) / len(values)),
}


# --- labels ---------------------------------------------------------------------------------------------------------


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, HEADS, TOKENS, HEAD_DIM, generator=generator),
        torch.randn(1, KV_HEADS, TOKENS, HEAD_DIM, generator=generator),
    )


def values_of() -> Tensor:
    return torch.randn(1, KV_HEADS, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(1))


def block_of(position: int, num_document: int, hosts: int) -> int:
    return next(host for host in range(hosts) if position < (host + 1) * num_document // hosts)


def sees(row: int, token: int, num_document: int, hosts: int | None) -> bool:
    if hosts is None or row >= num_document:
        return token < row
    return block_of(token, num_document, hosts) < block_of(row, num_document, hosts)


def slow_label(kind: LabelKind, rows: list[int], token: int, kv_head: int, num_document: int, hosts: int | None) -> Any:
    """Return one label, in plain Python; None for a token that is not observed."""
    queries, keys = states()
    by_head = []
    for head in range(kv_head * 2, kv_head * 2 + 2):
        seen = []
        for row in rows:
            if not sees(row, token, num_document, hosts):
                continue
            logits = [SCALE * float(queries[0, head, row] @ keys[0, kv_head, other]) for other in range(row + 1)]
            weight = math.exp(logits[token]) / math.fsum(map(math.exp, logits))
            values = {"logit": logits[token], "weight": weight * (row + 1), "log_weight": math.log(weight)}
            seen.append(values[kind.label])
        if not seen:
            return None
        by_head.append(REDUCED[kind.over_observers](seen))
    return REDUCED[kind.over_heads](by_head)


@pytest.mark.parametrize("value", ["logit", "weight", "log_weight"])
@pytest.mark.parametrize(
    ("over_observers", "over_heads"),
    [("max", "max"), ("mean", "max"), ("max", "mean"), ("logmeanexp", "logmeanexp"), ("logmeanexp", "max")],
)
@pytest.mark.parametrize(
    ("rows", "num_document", "hosts"),
    [([24, 25, 29], 20, None), ([3, 9, 17, 23], 24, None), ([3, 9, 17, 23], 24, 3), ([5, 26], 24, 4)],
    ids=["answer", "later", "later, by blocks", "last block observed by later tokens"],
)
def test_labels(
    value: str, over_observers: str, over_heads: str, rows: list[int], num_document: int, hosts: int | None
) -> None:
    kind = LabelKind(value, over_observers, over_heads)
    view = make_view(torch.tensor(rows), num_document, hosts)
    labels = label_tokens(kind, view, *states(), SCALE, values_of())
    expected = [
        [slow_label(kind, rows, token, kv_head, num_document, hosts) for kv_head in range(KV_HEADS)]
        for token in range(num_document)
    ]
    known = [row for row in expected if None not in row]
    assert labels.dtype == torch.float32 and labels.shape == (len(known), KV_HEADS) == (view.num_scored, KV_HEADS)
    torch.testing.assert_close(labels, torch.tensor(known), rtol=1e-5, atol=1e-5)


def test_standardising_keeps_the_order_of_labels() -> None:
    view = make_view(torch.tensor([25, 29]), 20)
    plain, standard = (
        label_tokens(LabelKind(standardise=on), view, *states(), SCALE, values_of()) for on in (False, True)
    )
    torch.testing.assert_close(standard.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard.var(dim=0, correction=0), torch.ones(2), rtol=0, atol=1e-5)
    assert torch.equal(plain.argsort(dim=0), standard.argsort(dim=0))


@pytest.mark.parametrize("value", ["weight", "log_weight"])
@pytest.mark.parametrize("reduction", ["max", "mean", "logmeanexp"])
def test_weights_are_multiplied_by_value_norms(value: str, reduction: str) -> None:
    view = make_view(torch.tensor([25, 29]), 20)
    values = values_of()
    plain, weighted = (
        label_tokens(LabelKind(value, reduction, "max", value_norms=on), view, *states(), SCALE, values)
        for on in (False, True)
    )
    for token in range(20):
        for head in range(KV_HEADS):
            norm = math.sqrt(sum(float(number) ** 2 for number in values[0, head, token]))
            label = float(plain[token, head])
            expected = label * norm if value == "weight" else label + math.log(norm)
            assert float(weighted[token, head]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_attention_received() -> None:
    queries, keys = states()
    rows = [22, 28]
    received = attention_received(make_view(torch.tensor(rows), 20), queries, keys, SCALE)
    logits = torch.einsum("hqd,hkd->hqk", queries[0], keys[0].repeat_interleave(2, dim=0)) * SCALE
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    weights = logits.masked_fill(~causal, -torch.inf).softmax(dim=-1)
    expected = weights[:, rows, :20].sum(dim=1).unflatten(0, (KV_HEADS, 2)).sum(dim=1)
    torch.testing.assert_close(received, expected)


def test_nothing_is_observed() -> None:
    with pytest.raises(ValueError, match="no later token observes"):
        make_view(torch.tensor([2, 3]), 20, hosts=4)


@pytest.mark.parametrize(
    "values",
    [{"label": "logits"}, {"over_heads": "sum"}, {"standardise": 1}, {"value_norms": 1}, {"value_norms": True}],
)
def test_unknown_labels(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"train\."):
        LabelKind(**values)


# --- the forward and the loss ---------------------------------------------------------------------------------------


def test_observing_leaves_the_model_unchanged() -> None:
    model, ids = build_model("qwen2"), distinct_ids(40)
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
    seen: dict[int, tuple[Tensor, ...]] = {}
    last: list[Tensor] = []
    handle = model.base_model.norm.register_forward_hook(lambda module, args, output: last.append(output))
    observe_layers(model, ids, lambda layer, *tensors: seen.__setitem__(layer, tensors[:3]))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model.lm_head(last[0]), before)  # it attends like the plain model
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert NAME not in AttentionInterface() and model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    assert list(seen) == [0, 1, 2]
    for projections, queries, keys in seen.values():
        assert projections.shape == (40, 128) and not projections.requires_grad
        assert queries.shape == (1, 4, 40, 16) and keys.shape == (1, 2, 40, 16)
        # Rotation keeps norms; position 0 is not rotated.
        q, k = projections[:, :64].unflatten(1, (4, 16)), projections[:, 64:96].unflatten(1, (2, 16))
        torch.testing.assert_close(q.norm(dim=-1), queries[0].transpose(0, 1).norm(dim=-1))
        torch.testing.assert_close(k[0], keys[0, :, 0])
        assert not torch.allclose(k[30], keys[0, :, 30])


def make_loss(hidden: int = 16, **options: Any) -> HeadsLoss:
    model = build_model("llama")
    heads = RetainingHeads.random(head_sizes(model), hidden, seed=1)
    return HeadsLoss(model, heads, LabelKind(), options.pop("smoothing", 0.0025), **options)


EXAMPLES = [
    Example(distinct_ids(60)[0].tolist(), 40, [50, 51, 59], "one"),
    Example(distinct_ids(45, seed=1)[0].tolist(), 30, [33, 44], "two"),
]


def test_the_loss_matches_its_formula() -> None:
    loss = make_loss(smoothing=0.5)
    batch = pad_examples(EXAMPLES, 0)
    assert batch.input_ids.shape == (2, 60) and batch.num_tokens == 120 and batch.kinds == ("one", "two")
    losses = loss(batch.input_ids, batch.is_marked, batch.num_document)
    for example, found in zip(EXAMPLES, losses, strict=True):
        view = make_view(torch.tensor(example.marked), example.num_document)
        errors, steps = [], []

        def observe(
            layer: int, states: Tensor, *rest: Any, view: View = view, errors: list[Any] = errors, steps: Any = steps
        ) -> None:
            scores, labels = loss.heads(layer, states[: view.num_scored]), label_tokens(LabelKind(), view, *rest)
            difference = (scores - labels).abs()
            errors.append(torch.where(difference < 1, difference**2 / 2, difference - 0.5))
            steps.append((scores[1:] - scores[:-1]).square().mean())

        observe_layers(loss.model, torch.tensor([example.ids]), observe)
        expected = torch.stack(errors).mean() + 0.5 * torch.stack(steps).sum()
        torch.testing.assert_close(found, expected)
    assert losses.dtype == torch.float32


def test_only_heads_are_trained_and_saved() -> None:
    loss = make_loss()
    batch = pad_examples(EXAMPLES, 0)
    loss(batch.input_ids, batch.is_marked, batch.num_document).mean().backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in loss.heads.parameters())
    assert all(weight.grad is None for weight in loss.model.parameters())
    assert all(name.startswith("heads.") for name in loss.state_dict())


def test_padding_does_not_change_the_loss() -> None:
    loss = make_loss()
    together = pad_examples(EXAMPLES, 7)
    both = loss(together.input_ids, together.is_marked, together.num_document)
    for example, found in zip(EXAMPLES, both, strict=True):
        alone = pad_examples([example], 0)
        assert torch.equal(loss(alone.input_ids, alone.is_marked, alone.num_document)[0], found)


def test_the_loss_of_one_token_has_no_smoothing() -> None:
    assert float(make_loss().layer_loss(torch.zeros(1, 2), torch.ones(1, 2))) == pytest.approx(0.5 / 3)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_overlap_by_hand() -> None:
    labels = torch.arange(20.0).repeat(2, 1)
    assert _overlap(labels, labels) == 1
    assert _overlap(-labels, labels) == 0
    half = labels.clone()
    half[:, 19] = -1  # misses one of the two best
    assert _overlap(half, labels) == 0.5


def test_kept_mass_by_hand() -> None:
    """Two blocks of ten keep two tokens each; all attention is on three tokens."""
    received = torch.zeros(1, 20)
    received[0, 4], received[0, 14], received[0, 15] = 1.0, 2.0, 1.0
    scores = torch.arange(20.0).unsqueeze(0)  # keeps 8 and 9, since pooling makes 7, 8, 9 equal; and 17, 18
    mass = _kept_mass(scores, received, 2, 5)
    assert mass == {"mass": 0.0, "mass_random": pytest.approx(0.2), "mass_best": 1.0}
    scores[0, 14] = 100.0  # pooling makes 12 to 16 equal; the first two are kept
    assert _kept_mass(scores, received, 2, 5)["mass"] == 0.0
    scores[0, 16] = 101.0  # 14 to 18
    assert _kept_mass(scores, received, 2, 5)["mass"] == pytest.approx(0.75)


@pytest.mark.parametrize("hosts", [None, 4])
def test_measured_heads(hosts: int | None) -> None:
    example = Example(distinct_ids(90)[0].tolist(), 80, [10, 40, 70, 85, 89], "later")
    found = measure(make_loss(hosts=hosts), example, 4, 4.0, torch.device("cpu"))
    assert set(found) == {"loss", "overlap", "mass", "mass_random", "mass_best"}
    assert found["mass_best"] > found["mass_random"] == pytest.approx(0.25, abs=0.02)  # 5 of 20 tokens in each block
    assert 0 < found["mass"] < found["mass_best"] and 0 <= found["overlap"] <= 1 and found["loss"] > 0


def test_means_over_all_and_by_kind() -> None:
    loss = make_loss()
    examples = [*EXAMPLES, replace(EXAMPLES[1], kind="one")]
    options: dict[str, Any] = {"hosts": 2, "ratio": 4.0, "device": torch.device("cpu")}
    found = measure_all(loss, examples, SequenceGroup(), **options)
    one, two = (measure(loss, example, **options)["loss"] for example in EXAMPLES)
    assert found["loss"] == pytest.approx((one + 2 * two) / 3, abs=1e-4)
    assert found["by_kind"]["one"]["loss"] == pytest.approx((one + two) / 2, abs=1e-4)
    assert found["by_kind"]["two"]["loss"] == pytest.approx(two, abs=1e-4)


@pytest.mark.parametrize(("terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_the_bar_is_shown_on_a_terminal_only(terminal: bool, shown: bool) -> None:
    stream = io.StringIO()
    with steps_progress(Console(file=stream, force_terminal=terminal), 8, 2, shown=shown) as show:
        assert (show is not None) == (terminal and shown)
        if show is not None:
            show(6)
    assert ("75%" in stream.getvalue()) == (terminal and shown)


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(24):
        lines = [f"Line {line} of text {number} says {line * number}." for line in range(200)]
        (folder / f"text{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "short.txt").write_text("short", encoding="utf-8")
    (folder / "bytes.txt").write_bytes(b"\xff\x00" * 4000)
    (folder / "picture.png").write_bytes(b"a" * 5000)
    return folder


def test_texts_of_a_folder(folder: Path) -> None:
    files = find_texts([str(folder)])
    assert [file.name for file in files] == sorted(f"text{number}.txt" for number in range(24))
    assert "".join(read_pieces(files[0])) == files[0].read_text()
    assert max(map(len, read_pieces(files[0]))) < 300
    training, measuring = split_texts(files)
    assert training and measuring and not set(training) & set(measuring)
    assert set(training) | set(measuring) == set(files)
    assert split_texts(files[:1]) == (files[:1], files[:1])
    assert places_of(files) == [f"{folder} (24)"]


@pytest.mark.parametrize("name", ["nowhere", "picture.png/x"])
def test_no_texts(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"train\.texts"):
        find_texts([str(folder / name)])


def test_default_texts_exclude_those_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_is_text_file", lambda file: file.is_file() and file.stat().st_size > 50_000)
    monkeypatch.setattr(texts_module, "EXTRA_PLACES", ())
    files = find_texts(None)
    names = {"/".join(file.parts[-2:]) for file in files} | {file.name for file in files}
    assert not set(STANDARD_TEXTS) & names and "inspect.py" in names
    assert not any("site-packages" in str(file) for file in files)


def test_default_texts_outside_the_standard_library(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doc").symlink_to(folder)
    (tmp_path / "doc-2").symlink_to(folder)
    monkeypatch.setattr(texts_module, "_standard_library", lambda: iter(()))
    monkeypatch.setattr(texts_module, "EXTRA_PLACES", (str(tmp_path / "doc*").lstrip("/"), "no/such/place"))
    assert find_texts(None) == find_texts([str(folder)])


def test_filler_continues_with_another_text(folder: Path) -> None:
    files = find_texts([str(folder)])
    filler = TextFiller(files, Draws("filler"))
    first = list(filler.sentences(10))
    more = filler.sentences(100)
    assert more[:10] == first and len(more) == 100
    assert len({piece.split(" of text ")[1].split()[0] for piece in more}) > 1
    assert TextFiller(files, Draws("filler")).sentences(100) == more
    assert TextFiller(files, Draws("another")).sentences(100) != more


# --- the user's conversations ---------------------------------------------------------------------------------------


def write_data(file: Path, *rows: Any) -> ShareGPT:
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return ShareGPT(str(file))


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def test_conversations_are_read(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": 1, "conversations": [turn("human", "Q0"), turn("gpt", "A0"), turn("human", "Q1"), turn("gpt", "A1")]},
        {"conversations": [turn("system", "be brief"), turn("user", "Q2"), turn("assistant", "A2")]},
        "",
        {"instruction": "Q3", "output": "Ä3"},
    ]
    data = write_data(tmp_path / "data.jsonl", *rows)
    data.check()
    assert [data.pair(index) for index in range(3)] == [("Q0", "A0"), ("Q2", "A2"), ("Q3", "Ä3")]
    assert data.indices == [1, 2] and ShareGPT(str(data.path), held_out=True).indices == [0]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("no json", "JSONDecodeError"),
        ([1], "line 1"),
        ({"text": "x"}, "KeyError: 'instruction'"),
        ({"conversations": [turn("gpt", "A")]}, "no question followed by an answer"),
        ({"conversations": [turn("human", "Q")]}, "no question followed by an answer"),
        ({"conversations": [turn("human", "Q"), turn("human", "Q")]}, "no question followed by an answer"),
        ({"conversations": [turn("human", " "), turn("gpt", "A")]}, "an empty question or answer"),
    ],
)
def test_bad_conversations(tmp_path: Path, row: Any, part: str) -> None:
    with pytest.raises(ValueError, match=r"train\.data: line 1 of .*data\.jsonl") as caught:
        write_data(tmp_path / "data.jsonl", row).check()
    assert part in str(caught.value)


def test_missing_conversations(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty"):
        write_data(tmp_path / "data.jsonl").check()
    with pytest.raises(ValueError, match=r"train\.data.*nope"):
        ShareGPT(str(tmp_path / "nope.jsonl"))


# --- generated conversations --------------------------------------------------------------------------------------

MIXTURE = [{"kind": "single", "num_questions": [1, 2]}, {"kind": "multikey_uuids"}, {"kind": "variables"}]


def make_maker(folder: Path, **changes: Any) -> ExampleMaker:
    config = HeadsConfig(output="x", **{"text_share": 0.5, "quote_share": 0.2, "continue_share": 0.2, **changes})
    return ExampleMaker(config, Mixture(MIXTURE), find_texts([str(folder)]), None, byte_tokenizer())


def test_seed_step_and_rank_determine_conversations(folder: Path) -> None:
    def batches(seed: int = 1, rank: int = 0) -> Batches:
        return Batches(make_maker(folder), Lengths(900, 1400, 0.0), 20, 3000, seed=seed, rank=rank)

    assert len(batches()) == 20
    for step in (0, 7, 19):
        first, again = batches()[step], batches()[step]
        assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.is_marked, again.is_marked)
        assert first.num_tokens <= 3000 + 1400 and first.input_ids.shape[1] <= 1400
    others = (batches()[8], batches(seed=2)[7], batches(rank=1)[7])
    assert all(not torch.equal(other.input_ids[0, :300], batches()[7].input_ids[0, :300]) for other in others)


def test_workers_make_the_same_batches(folder: Path) -> None:
    batches = Batches(make_maker(folder), Lengths(900, 1400, 0.0), 3, 1000, seed=1)
    made = list(load_batches(batches, 1, 3, 1))
    assert len(made) == 2
    for batch, step in zip(made, (1, 2), strict=True):
        assert torch.equal(batch.input_ids, batches[step].input_ids) and batch.kinds == batches[step].kinds


def test_observers_are_the_answers_after_the_document(folder: Path) -> None:
    tokenizer, kinds = byte_tokenizer(), set()
    for number in range(30):
        example = make_maker(folder).make(str(number), 2400)
        kinds.add(example.kind)
        assert len(example.ids) <= 2400 and 0 < example.num_document <= example.marked[0]
        assert example.marked == sorted(set(example.marked)) and example.marked[-1] < len(example.ids)
        document = tokenizer.decode(example.ids[: example.num_document])
        said = tokenizer.decode([example.ids[place] for place in example.marked])
        if example.kind == "quote":
            assert "Line" in said and said.strip().removesuffix("</s>").strip(" .") in document
        elif example.kind != "continue":
            assert all(word in document for word in said.replace("</s>", " ").replace(".", " ").split())
    assert kinds == {"single", "multikey_uuids", "variables", "quote", "continue"}


def test_text_share(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    for share, found in ((0.0, False), (1.0, True)):
        maker = make_maker(folder, text_share=share, quote_share=0.0, continue_share=0.0)
        made = [maker.make(str(number), 1500) for number in range(12)]
        texts = [tokenizer.decode(example.ids) for example in made if example.kind in ("single", "variables")]
        assert texts and all((" of text " in text) == found for text in texts)
        if share:  # a needle between two unchanged lines of the text
            assert all(re.search(r"says \d+\.\n[^\n]+\nLine \d+ of text \d+ says", text) for text in texts)


@pytest.mark.parametrize("number", [1, 5, 100_000])
def test_later_observers(folder: Path, number: int) -> None:
    answers, later = (
        make_maker(folder, observers=observers, num_observers=number).make("3", 1500)
        for observers in ("answer", "later")
    )
    assert answers.ids == later.ids and len(later.marked) == min(number, len(later.ids) - 1)
    assert later.marked == sorted(set(later.marked)) and later.marked[-1] == len(later.ids) - 1
    assert len(answers.marked) <= number and answers.marked[0] >= answers.num_document
    if number == 5:
        assert later.marked[0] < later.num_document


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "base"])
def test_the_users_conversations(folder: Path, tmp_path: Path, template: str | None) -> None:
    rows = [
        {"conversations": [turn("human", f"{number}" * 3000), turn("gpt", f"answer {number}")]} for number in "1234"
    ]
    write_data(tmp_path / "data.jsonl", *rows)
    tokenizer = byte_tokenizer(template=template)
    for held_out, among in ((False, "234"), (True, "1")):
        data = ShareGPT(str(tmp_path / "data.jsonl"), held_out=held_out)
        config = HeadsConfig(output="x", data=str(data.path))
        example = ExampleMaker(config, Mixture(MIXTURE), [], data, tokenizer).make("0", 1000)
        assert len(example.ids) == 1000 and example.kind == "given"  # a long prompt loses its middle
        said = tokenizer.decode([example.ids[place] for place in example.marked])
        assert said in [f"answer {number}</s>" for number in among]
        assert example.marked[0] == example.num_document
        prompt = tokenizer.decode(example.ids[: example.num_document])
        assert prompt.startswith("<s>") and prompt.endswith("<|assistant|>" if template else "\n")
    broken = write_data(tmp_path / "broken.jsonl", rows[0], "{}")
    with pytest.raises(ValueError, match=r"line 2 of .*broken"):  # an error, not skipped
        ExampleMaker(config, Mixture(MIXTURE), [], broken, tokenizer).make("0", 1000)


def test_no_conversation_is_short_enough(folder: Path) -> None:
    maker = make_maker(folder, quote_share=0.0, continue_share=0.0)
    with pytest.raises(ValueError, match=r"120 tokens.*train\.min_length"):
        maker.make("0", 120)
    with pytest.raises(RuntimeError, match="120 tokens"):  # another rank would wait for this one
        Batches(maker, Lengths(120, 120, 0.0), 2, 120, seed=0)[0]


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": ""}, "train.output=''"),
        ({"hidden_size": 0}, "train.hidden_size=0"),
        ({"stepz": 5}, "Did you mean 'steps'"),
        ({"steps": 100}, "train.warmup_steps=2000 must be below train.steps=100"),
        ({"min_length": 100}, "train.min_length=100"),
        ({"max_length": 300}, "train.max_length=300"),
        ({"label": "logits"}, "train.label='logits'"),
        ({"over_observers": "sum"}, "train.over_observers='sum'"),
        ({"over_heads": "sum"}, "train.over_heads='sum'"),
        ({"observers": "answers"}, "Did you mean 'answer'"),
        ({"observed_hosts": 1}, "train.observed_hosts=1"),
        ({"text_share": 1.5}, "train.text_share=1.5"),
        ({"quote_share": 0.7, "continue_share": 0.7}, "more than 1 together"),
        ({"texts": []}, "train.texts=[]"),
        ({"texts": "folder"}, "train.texts='folder'"),
        ({"data": 3}, "train.data=3"),
        ({"clip": 0}, "train.clip=0"),
        ({"smoothing": -1}, "train.smoothing=-1"),
        ({"measured_ratio": 0.5}, "train.measured_ratio=0.5"),
        ({"workers": -1}, "train.workers=-1"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        from_mapping(HeadsConfig, {"output": "x", **values}, "train")
    assert message in str(raised.value)


@pytest.mark.parametrize("exp", [None, "smollm2_heads"])
def test_configs(exp: str | None) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        values = OmegaConf.to_container(compose("train_heads", [f"+exp={exp}"] if exp else []), resolve=True)
    assert isinstance(values, dict)
    assert set(values["train"]) == {field.name for field in fields(HeadsConfig)}
    config = from_mapping(HeadsConfig, values["train"], "train")
    kinds = {part.draw(Draws(str(exp))).kind for part in Mixture(config.mixture).parts}
    assert kinds >= {"single", "multikey_words", "multikey_uuids", "variables", "common_words"}
    geometry = ModelConfig.from_dict(dict(values["model"])).geometry
    assert config.max_length < geometry["max_position_embeddings"]
    if exp == "smollm2_heads":  # at 2 bytes per weight, at most 16 MB
        channels = (geometry["num_attention_heads"] + 2 * geometry["num_key_value_heads"]) * geometry["head_dim"]
        weights = config.hidden_size * (channels + geometry["num_key_value_heads"]) * geometry["num_hidden_layers"]
        assert 2 * weights < 16e6
