"""Training the instrument: conversations, mixtures, batches, the loss, settings."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from apb_ds.config import from_mapping
from apb_ds.hf.architecture import decoder_layers
from apb_ds.ops import compiled as compiling
from apb_ds.tasks import SyntheticConfig
from apb_ds.tasks.synthetic import Recipe, generate
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.training.answer_loss import AnswerLoss
from apb_ds.training.batches import Batches, Lengths
from apb_ds.training.config import InstrumentConfig, read_settings
from apb_ds.training.conversations import GeneratedConversations, make_conversation
from apb_ds.training.mixture import Mixture
from apb_ds.training.output import TrainingLog, read_lines
from apb_ds.training.trainer import Trainer
from tests import models
from tests.tiny_checkpoint import TEMPLATE, byte_tokenizer

MIXTURE = [{"kind": "single", "filler": ["noise", "prose"], "num_questions": [1, 3]}, {"kind": "multikey_words"}]


def length_of(tokenizer: Any) -> Any:
    return lambda text: len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "base"])
def test_the_first_question_is_asked_as_in_evaluation(template: str | None) -> None:
    tokenizer = byte_tokenizer(template=template)
    config = SyntheticConfig(kind="single", num_questions=2, num_tokens=900, num_samples=1)
    first, second = config.samples(tokenizer, 300, seed=5)
    from apb_ds.tasks.synthetic.task import DocumentEncoder

    document = generate(config, "5.0", 900, DocumentEncoder(tokenizer).length)
    made = make_conversation(tokenizer, document, "single", 4000)
    assert made is not None
    asked = first.document_ids[0].tolist() + first.query_ids[0].tolist()
    assert made.ids[: len(asked)] == asked and made.marked[0] >= len(asked)
    said = tokenizer.decode([made.ids[place] for place in made.marked])
    end = tokenizer.eos_token
    assert said == f" {first.ground_truth}.{end} {second.ground_truth}.{end}"
    # The second question follows the first answer and precedes its own.
    rest = tokenizer.decode(made.ids[len(asked) :])
    assert rest.index(document.questions[1].query) < rest.index(document.questions[1].answer_prefix)
    assert rest.count(end) == (4 if template else 2) - (1 if template else 0)


def test_questions_that_do_not_fit_are_left_out() -> None:
    tokenizer = byte_tokenizer()
    document = generate(Recipe(kind="single", split="train", num_questions=4), 1, 1200, length_of(tokenizer))
    whole = make_conversation(tokenizer, document, "single", 10_000)
    assert whole is not None and sum(token == tokenizer.eos_token_id for token in whole.ids) >= 4
    shorter = make_conversation(tokenizer, document, "single", len(whole.ids) - 1)
    assert shorter is not None and whole.ids[: len(shorter.ids)] == shorter.ids
    assert 0 < len(shorter.marked) < len(whole.marked)
    assert make_conversation(tokenizer, document, "single", 1200) is None


def test_a_mixture_draws_by_weight() -> None:
    mixture = Mixture([{"kind": "single", "weight": 3}, {"kind": "variables", "num_hops": [2, 5], "filler": "noise"}])
    draws = Draws("test")
    drawn = [mixture.draw(draws) for _ in range(400)]
    assert {recipe.split for recipe in drawn} == {"train"}
    counts = Counter(recipe.kind for recipe in drawn)
    assert 260 < counts["single"] < 340
    hops = Counter(recipe.num_hops for recipe in drawn if recipe.kind == "variables")
    assert set(hops) == {2, 5} and min(hops.values()) > 25


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "must be a list of recipes"),
        ("single", "must be a list of recipes"),
        ([{"filler": "prose"}], "must have a kind"),
        ([{"kind": "singel"}], "Did you mean 'single'"),
        ([{"kind": "single", "filer": "prose"}], "Did you mean 'filler'"),
        ([{"kind": "single", "split": "eval"}], "split"),
        ([{"kind": "single", "weight": 0}], "weight=0 must be a number above 0"),
        ([{"kind": "single", "filler": []}], "empty list"),
        ([{"kind": "single", "num_questions": [1, 0]}], "num_questions=0"),
        ([{"kind": "variables", "filler": "noise", "num_questions": [1, 4], "num_chains": 2}], "num_chains=2"),
    ],
)
def test_bad_mixtures(parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^train\.mixture") as raised:
        Mixture(parts)
    assert message in str(raised.value)


def batches(asked_first: float = 0.0, **changes: Any) -> Batches:
    values = {"num_steps": 20, "num_tokens": 3000, "seed": 1, "rank": 0, **changes}
    source = GeneratedConversations(Mixture(MIXTURE), byte_tokenizer(), asked_first)
    return Batches(source, Lengths(700, 1400, 0.5), **values)


def test_seed_step_and_rank_determine_batches() -> None:
    first, again = batches(), batches()
    for step in (0, 7, 19):
        assert torch.equal(first[step].input_ids, again[step].input_ids)
        assert first[step].kinds == again[step].kinds
    for other in (first[8], batches(seed=2)[7], batches(rank=1)[7]):
        assert other.input_ids.shape != first[7].input_ids.shape or not torch.equal(other.input_ids, first[7].input_ids)


def test_batches_are_full_and_answers_come_from_their_documents() -> None:
    made, tokenizer = batches(), byte_tokenizer()
    for step in range(0, 20, 4):
        batch = made[step]
        assert batch.input_ids.shape == batch.is_marked.shape and batch.num_tokens <= 3000 + 1400
        assert batch.input_ids.shape[1] <= 1400 and len(batch.kinds) == len(batch.input_ids)
        for ids, is_answer in zip(batch.input_ids, batch.is_marked, strict=True):
            said = tokenizer.decode(ids[is_answer])
            answers = [answer.strip(" .") for answer in said.split(tokenizer.eos_token) if answer]
            assert answers and all(tokenizer.decode(ids).count(answer) >= 2 for answer in answers)


def test_questions_before_the_document() -> None:
    """As in an anchor: one turn holds the question, then the document."""
    tokenizer = byte_tokenizer()
    plain, sometimes, always = (batches(share, num_steps=4, num_tokens=4000) for share in (0.0, 0.5, 1.0))
    firsts = {0.5: 0, 1.0: 0}
    total = 0
    for step in range(4):
        for share, made in ((0.5, sometimes), (1.0, always)):
            for ids in made[step].input_ids:
                text = tokenizer.decode(ids)
                document, _, rest = text.partition("</s>")
                question = rest.partition("<|user|>")[2].partition("</s>")[0]
                assert question and len(ids) <= 1400
                firsts[share] += document.partition("<|user|>")[2].startswith(f"{question}\n\n")
        total += len(always[step].input_ids)
    assert firsts[1.0] == total and 0 < firsts[0.5] < total
    assert torch.equal(plain[3].input_ids, batches(num_steps=4, num_tokens=4000)[3].input_ids)


def test_lengths_grow() -> None:
    lengths, draws = Lengths(512, 8192, 0.5), Draws("lengths")
    longest = [max(lengths.draw(progress, draws) for _ in range(200)) for progress in (0.0, 0.25, 0.5, 1.0)]
    assert longest[0] == 512 and 1500 < longest[1] <= 2048 and 7500 < longest[2] <= 8192 and 7500 < longest[3] <= 8192
    late = [lengths.draw(0.9, draws) for _ in range(400)]
    assert 4000 < sum(late) / len(late) < 4700  # uniform after growth
    assert {Lengths(512, 512, 0.0).draw(0.0, draws) for _ in range(5)} == {512}


def test_a_share_of_later_steps_has_the_longest_conversations() -> None:
    drawn = [Lengths(300, 900, 0.5, 0.25).draw(step / 4000, Draws("lengths", step)) for step in range(4000)]
    assert all(300 <= length <= 900 for length in drawn) and max(drawn[:1990]) < 900
    assert 0.22 < drawn[2000:].count(900) / 2000 < 0.28
    assert max(Counter(length for length in drawn[2000:] if length < 900).values()) < 15
    assert Lengths(300, 900, 0.5).draw(0.9, Draws("x")) == Lengths(300, 900, 0.5, 0.0).draw(0.9, Draws("x"))


def test_no_recipe_is_short_enough() -> None:
    source = GeneratedConversations(Mixture([{"kind": "common_words"}]), byte_tokenizer())
    with pytest.raises(ValueError, match=r"no recipe for 300 tokens; raise train.min_length"):
        source.make("check", 300)
    with pytest.raises(RuntimeError, match=r"no recipe for 300 tokens"):  # another rank would wait for this one
        Batches(source, Lengths(300, 300, 0.0), 4, 600, seed=0)[0]
    assert len(GeneratedConversations(Mixture(MIXTURE), byte_tokenizer()).make("check", 700).ids) <= 700


def test_the_loss_covers_answers_and_weighs_conversations_equally() -> None:
    peft = pytest.importorskip("peft")
    model = models.llama()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    ids = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))
    is_answer = torch.zeros(3, 40, dtype=torch.bool)
    for row, places in enumerate(([5, 6, 39], [1], [20, 21, 22, 23])):
        is_answer[row, places] = True
    losses = AnswerLoss(adapted)(ids, is_answer)
    for row in range(3):
        labels = ids[row : row + 1].masked_fill(~is_answer[row : row + 1], -100)
        expected = adapted(input_ids=ids[row : row + 1], labels=labels).loss
        torch.testing.assert_close(losses[row], expected, atol=1e-5, rtol=1e-5)
    losses.mean().backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output": ""}, "train.output=''"),
        ({"steps": 0}, "train.steps=0"),
        ({"stepz": 5}, "Did you mean 'steps'"),
        ({"min_length": 100}, "train.min_length=100"),
        ({"max_length": 300}, "train.max_length=300"),
        ({"growth": 1.5}, "train.growth=1.5"),
        ({"at_longest": -0.5}, "train.at_longest=-0.5"),
        ({"learning_rate": 0}, "train.learning_rate=0"),
        ({"weight_decay": -1}, "train.weight_decay=-1"),
        ({"steps": 10, "warmup_steps": 10}, "train.warmup_steps=10 must be below"),
        ({"overwrite": "yes"}, "train.overwrite='yes'"),
        ({"workers": -1}, "train.workers=-1"),
        ({"fused": "no"}, "train.fused='no'"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        from_mapping(InstrumentConfig, {"output": "x", **values}, "train")
    assert message in str(raised.value)


@pytest.mark.parametrize(("key", "value"), [("shard_ranks", 1), ("stages", 2)])
def test_copies_and_stages_are_for_inference(key: str, value: int) -> None:
    values = {"train": {"output": "x"}, "model": {"path": "x"}, "parallel": {key: value}}
    with pytest.raises(ValueError, match=rf"parallel\.{key}={value} is for inference; leave it out"):
        read_settings(InstrumentConfig, values)


def test_a_dtype_that_the_device_does_not_train_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ValueError, match=r"model.dtype='float16'.*use bfloat16"):
        Trainer(torch.nn.Linear(2, 2), InstrumentConfig(output="x"), torch.float16, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path / "log.jsonl", 0)
    log.add(("single", "single"), 100, torch.tensor([1.0, 2.0]))
    log.write(1, 9, 1e-3)
    log.add(("single", "variables"), 100, torch.tensor([1.0, float("nan")]))
    with pytest.raises(RuntimeError, match=r"step 2 is not finite.*train\.learning_rate"):
        log.write(2, 9, 1e-3)
    assert [line["loss"] for line in read_lines(tmp_path / "log.jsonl")] == [1.5]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_compiled_layers_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(models.llama(num_hidden_layers=2), lora)
    loss = AnswerLoss(adapted)

    def gradients(rows: int, length: int) -> list[torch.Tensor]:
        ids = torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(rows))
        adapted.zero_grad()
        loss(ids, torch.ones_like(ids, dtype=torch.bool)).mean().backward()
        return [weight.grad.clone() for weight in adapted.parameters() if weight.grad is not None]

    shapes = [(3, 40), (2, 21), (5, 64)]
    expected = [gradients(*shape) for shape in shapes]
    layers = decoder_layers(adapted.get_base_model())
    assert len(layers) == adapted.config.num_hidden_layers
    # The default backend takes half a minute and is not tested here.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiling.compile_forwards(layers)
    torch._dynamo.utils.counters.clear()
    for shape, wanted in zip(shapes, expected, strict=True):
        for found, gradient in zip(gradients(*shape), wanted, strict=True):
            torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)
    counters = torch._dynamo.utils.counters
    assert 1 <= counters["stats"]["unique_graphs"] <= 2, "all layers and lengths share the compiled graphs"
    assert not counters["graph_break"]
