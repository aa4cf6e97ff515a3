"""benchmarks/compressors.py and benchmarks/fidelity.py on a tiny random model, on the CPU."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb_ds.compressors.retaining_heads import read_heads
from apb_ds.loading.heads import head_sizes
from apb_ds.training.heads.observe import observe_layers
from benchmarks import common, compressors, fidelity
from tests import models
from tests.heads import random_checkpoint, save_heads
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint

NUM_TOKENS, JUDGED, HOSTS = 512, 24, 4
BLOCK, ANCHOR = NUM_TOKENS // HOSTS, NUM_TOKENS // HOSTS // 4
RATIOS = [4, 8]
# Sums of float32 in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, heads for it, and three texts, of which one is too short."""
    folder = tmp_path_factory.mktemp("study")
    vocab_size = len(byte_tokenizer())
    heads = save_heads(folder / "heads.pt", random_checkpoint(models.llama(vocab_size=vocab_size)))
    found = {"model": save_checkpoint(folder / "model"), "heads": heads}
    for name, length in (("one", NUM_TOKENS + JUDGED), ("two", 2 * NUM_TOKENS), ("short", NUM_TOKENS)):
        generator = torch.Generator().manual_seed(length)
        letters = torch.randint(97, 123, (length,), generator=generator).tolist()
        found[name] = folder / f"{name}.txt"
        found[name].write_text("".join(map(chr, letters)), encoding="utf-8")
    return found


def arguments(tiny: dict[str, Path], out: Path, *more: Any) -> list[str]:
    given = [tiny["one"], tiny["two"], "--model", tiny["model"], "--num-tokens", NUM_TOKENS]
    return [str(part) for part in (*given, "--judged", JUDGED, "--hosts", HOSTS, "--out", out, *more)]


def study(tiny: dict[str, Path], out: Path, *more: Any) -> argparse.Namespace:
    return compressors.parse_arguments(
        arguments(tiny, out, "--block", 64, "--heads-hidden", 16, "--ratios", *RATIOS, *more)
    )


@pytest.fixture(scope="module")
def record(tiny: dict[str, Path]) -> dict[str, Any]:
    return compressors.measure(study(tiny, Path("unused"), "--heads", tiny["heads"]))


def by_hand(family_model: Any, ids: Tensor, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one layer's whole causal attention, (kv_heads, heads per KV head, tokens, tokens), its keys and values."""
    found = []

    def observe(index: int, projections: Tensor, queries: Tensor, keys: Tensor, scale: float, values: Tensor) -> None:
        if index == layer_idx:
            repeated = keys[0].repeat_interleave(queries.shape[1] // keys.shape[1], dim=0)
            logits = scale * queries[0] @ repeated.transpose(1, 2)
            logits = logits + torch.full_like(logits[0], -torch.inf).triu(1)
            found.extend((logits.softmax(dim=-1).unflatten(0, (keys.shape[1], -1)), keys[0], values[0]))

    observe_layers(family_model, ids, observe)
    return found[0], found[1], found[2]


def test_recall_matches_full_attention_by_hand() -> None:
    """Every mass recomputed from a layer's full attention, for tokens chosen without a compressor."""
    model, layer_idx, ratio = models.llama(), 1, 4
    ids = models.distinct_ids(NUM_TOKENS + JUDGED)
    plans = compressors.make_plans(NUM_TOKENS, HOSTS, [ratio])
    views = compressors.make_views(NUM_TOKENS, JUDGED, HOSTS, torch.device("cpu"))
    shares = compressors.text_recall(model, ids, NUM_TOKENS, plans, views, compressors.make_rows(None))
    attention, keys, _ = by_hand(model, ids, layer_idx)

    count = BLOCK // ratio
    total: dict[str, Any] = {"judged": 0.0, "later_blocks": 0.0}
    kept = {(name, row): torch.zeros(keys.shape[0]) for name in total for row in ("recent", "knorm", "best", "mean")}
    for host in range(HOSTS - 1):
        stop = (host + 1) * BLOCK
        start = ANCHOR if host == 0 else host * BLOCK  # the first block's first tokens are the anchor's
        small = keys[:, start:stop].norm(dim=-1).topk(count, largest=False).indices
        later = [row for row in range(BLOCK, NUM_TOKENS, compressors.LATER_STEP) if row >= stop]
        for name, rows in (("judged", range(NUM_TOKENS, NUM_TOKENS + JUDGED)), ("later_blocks", later)):
            mass = attention[:, :, list(rows), start:stop].sum(dim=(1, 2))
            total[name] = total[name] + mass.sum(dim=1)
            kept[name, "recent"] += mass[:, -count:].sum(dim=1)
            kept[name, "knorm"] += mass.gather(1, small).sum(dim=1)
            kept[name, "best"] += mass.topk(count).values.sum(dim=1)
            kept[name, "mean"] += mass.mean(dim=1) * count
    for (name, row), mass in kept.items():
        ours = shares[name, str(ratio), row][layer_idx, 0]
        torch.testing.assert_close(ours, mass / total[name], rtol=0, atol=TOLERANCE, msg=f"{name}, {row}")
    recent = kept["judged", "recent"] / total["judged"]
    for other in (shares["judged", str(ratio), "recent"][0, 0], kept["later_blocks", "recent"] / total["later_blocks"]):
        assert (recent - other).abs().max() > 100 * TOLERANCE  # another layer, or other observers, would show


def test_recall_omits_the_last_layer() -> None:
    model = models.llama()
    plans = compressors.make_plans(NUM_TOKENS, HOSTS, [4])
    views = compressors.make_views(NUM_TOKENS, JUDGED, HOSTS, torch.device("cpu"))
    rows = compressors.make_rows(None)
    shares = compressors.text_recall(model, models.distinct_ids(NUM_TOKENS + JUDGED), NUM_TOKENS, plans, views, rows)
    layers, kv_heads = model.config.num_hidden_layers - 1, model.config.num_key_value_heads
    for (_, _, row), of_row in shares.items():
        assert of_row.shape == (layers, common.SEEDS if row == "random" else 1, kv_heads), row


def test_block_states_of_a_layer() -> None:
    """`query` observes with the document's last tokens, none of the judged; heads see this block's projections."""
    tokens, channels = NUM_TOKENS + JUDGED, 8
    positions = torch.arange(float(tokens))
    states = positions[None, None, :, None].expand(1, 2, tokens, 4)
    projections = positions[:, None].expand(tokens, channels)
    block = compressors.Layer(1, projections, states, states, states, 0.5, NUM_TOKENS).block(BLOCK, 2 * BLOCK)
    assert block.anchor_queries is not None and block.projections is not None
    observers = range(NUM_TOKENS - common.OBSERVERS, NUM_TOKENS)
    assert block.anchor_queries[0, 0, :, 0].tolist() == list(observers)
    assert block.start == BLOCK and block.num_tokens == BLOCK
    for given in (block.keys[0, 0, :, 0], block.queries[0, 0, :, 0], block.projections[0, :, 0]):
        assert given.tolist() == list(range(BLOCK, 2 * BLOCK))


def test_record_of_the_study(record: dict[str, Any], tiny: dict[str, Path]) -> None:
    part = record["attention_mass"]
    assert [text["name"] for text in part["texts"]] == ["one.txt", "two.txt"]
    assert part["texts"][0]["sha256"] == hashlib.sha256(tiny["one"].read_bytes()).hexdigest()
    assert part["heads"] == {"name": "heads.pt", "sha256": hashlib.sha256(tiny["heads"].read_bytes()).hexdigest()}
    for ratio in RATIOS:
        assert part["kept"][str(ratio)] == {
            "anchor_tokens": ANCHOR,
            "eligible_tokens": [BLOCK - ANCHOR, *[BLOCK] * (HOSTS - 2)],
            "kept_tokens": [BLOCK // ratio] * (HOSTS - 1),
        }
    names = {*common.UNTRAINED, *common.WITH_HEADS, "random"}
    for observers in ("judged", "later_blocks"):
        for ratio in RATIOS:
            rows = part["recall"][observers][str(ratio)]
            assert set(rows) == {*names, "best", "mean"}
            for name in names:
                for text, share in rows[name]["by_text"].items():
                    assert 0 < share < rows["best"]["by_text"][text], (observers, ratio, name)
            assert rows["random"]["minus_random"] == {"mean": 0.0, "interval_95": (0.0, 0.0)}
            gain = rows["best"]["mean"] - rows["random"]["mean"]
            low, high = rows["best"]["minus_random"]["interval_95"]
            assert rows["best"]["minus_random"]["mean"] == pytest.approx(gain) and 0 < low <= gain <= high
            seeds = rows["random"]["by_seed"]
            assert len(set(seeds)) == common.SEEDS and statistics.mean(seeds) == pytest.approx(rows["random"]["mean"])
        few, many = (part["recall"][observers][str(ratio)] for ratio in reversed(RATIOS))
        assert all(few[name]["mean"] < many[name]["mean"] for name in few)
    times = record["milliseconds"]["times"]
    for ratio in RATIOS:
        assert set(times[str(ratio)]) == names
        assert all(row["kept_tokens"] == 64 // ratio and row["min_ms"] > 0 for row in times[str(ratio)].values())
    assert "CPU" in record["milliseconds"]["clock"] and record["milliseconds"]["fused"] is False


def test_random_keeps_its_expected_share(record: dict[str, Any]) -> None:
    for ratio in RATIOS:
        rows = record["attention_mass"]["recall"]["judged"][str(ratio)]
        # The mean over blocks of what may be kept of them: the first has fewer, so a little more than 1/ratio.
        assert 1 / ratio < rows["mean"]["mean"] < BLOCK / (BLOCK - ANCHOR) / ratio
        # 5 seeds, 2 texts, 2 layers, 2 KV heads and 3 blocks of at least 16 tokens: one in five off is a mistake.
        assert rows["random"]["mean"] == pytest.approx(rows["mean"]["mean"], rel=0.2)


def test_heads_choose_by_their_scores(tiny: dict[str, Path]) -> None:
    """Heads that score by position keep what `recent` keeps: the checkpoint makes the choice."""
    vocab_size = len(byte_tokenizer())
    model = models.llama(vocab_size=vocab_size)
    heads = read_heads(tiny["heads"], head_sizes(model))
    rows = compressors.make_rows(heads)
    compressor = rows["retaining_heads"][0]
    assert isinstance(compressor, compressors.RetainingHeadsCompressor)
    assert compressor.heads is heads
    assert "retaining_heads" not in compressors.make_rows(None)
    plans = compressors.make_plans(NUM_TOKENS, HOSTS, [4])
    views = compressors.make_views(NUM_TOKENS, JUDGED, HOSTS, torch.device("cpu"))
    ids = models.distinct_ids(NUM_TOKENS + JUDGED) % vocab_size
    shares = compressors.text_recall(model, ids, NUM_TOKENS, plans, views, rows)
    positions = torch.arange(float(BLOCK)).unsqueeze(1)
    compressor.heads = lambda layer_idx, projections: positions.expand(-1, 2)  # type: ignore[assignment]
    again = compressors.text_recall(model, ids, NUM_TOKENS, plans, views, rows)
    for observers in views:
        recent = again[observers, "4", "recent"]
        assert not torch.allclose(shares[observers, "4", "retaining_heads"], recent, atol=100 * TOLERANCE)
        # Pooling makes the last scores of a block equal, and ties go to the earlier ones: nearly the same tokens.
        assert torch.allclose(again[observers, "4", "retaining_heads"], recent, atol=0.05)


def test_the_command_writes_record_and_figure(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, figure = tmp_path / "mass.json", tmp_path / "figures" / "mass.png"
    given = arguments(tiny, out, "--block", 64, "--heads-hidden", 16, "--figure", figure)
    monkeypatch.setattr(sys, "argv", ["compressors.py", *given])
    compressors.main()
    recall = json.loads(out.read_text(encoding="utf-8"))["attention_mass"]["recall"]
    assert set(recall["judged"]) == {"8", "16"} and "retaining_heads" not in recall["judged"]["8"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*common.UNTRAINED, "random", "best", "mean"))


@pytest.mark.parametrize("command", [compressors, fidelity])
def test_a_missing_checkpoint_is_named(command: Any, tiny: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse_arguments(arguments(tiny, Path("unused"), "--heads", "nowhere.pt"))
    assert "--heads='nowhere.pt': file not found" in capsys.readouterr().err


def test_settings_that_leave_nothing_to_measure(tiny: dict[str, Path]) -> None:
    for hosts, num_tokens in ((1, NUM_TOKENS), (HOSTS, 1)):
        with pytest.raises(ValueError, match=f"--hosts={hosts} passes on nothing of --num-tokens={num_tokens};"):
            compressors.make_plans(num_tokens, hosts, RATIOS)
    asked = compressors.parse_arguments([str(tiny["short"]), *arguments(tiny, Path("unused"))])
    with pytest.raises(ValueError, match=r"short\.txt has 512 tokens"):
        compressors.measure(asked)


def test_ratio_and_heads_make_the_settings() -> None:
    rows = fidelity.settings_to_compare(HOSTS)
    assert "retaining_heads" not in rows
    assert not any("compression_ratio" in values for variants in rows.values() for values in variants)
    rows = fidelity.settings_to_compare(HOSTS, 16.0, with_heads=True)
    nothing_passed = {"local block only", "anchor only", "star"}
    for name, variants in rows.items():
        for values in variants:
            assert values.get("compression_ratio") == (None if name in nothing_passed else 16.0), name
            fidelity.APBConfig(**values)
    assert [values["seed"] for values in rows["random"]] == list(range(common.SEEDS))


def test_fidelity_compares_heads_at_a_ratio(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fidelity.json"
    records = []
    for more in ((), ("--ratio", 2, "--heads", tiny["heads"])):
        monkeypatch.setattr(sys, "argv", ["fidelity.py", *arguments(tiny, out, *more)])
        fidelity.main()
        records.append(json.loads(out.read_text(encoding="utf-8")))
    default, asked = records
    assert (default["ratio"], default["heads"]) == (8, None) and "retaining_heads" not in default["kl"]
    assert asked["ratio"] == 2
    assert asked["heads"] == {"name": "heads.pt", "sha256": hashlib.sha256(tiny["heads"].read_bytes()).hexdigest()}
    assert set(asked["kl"]) == {*default["kl"], *common.WITH_HEADS}
    for name, of_default in default["kl"].items():
        passes_nothing = name in ("local block only", "anchor only", "star")
        assert (asked["kl"][name] == of_default) == passes_nothing, name
    assert asked["mean_kl"]["random"] < default["mean_kl"]["random"] < default["mean_kl"]["anchor only"]
    assert asked["kl"]["retaining_heads"] not in [asked["kl"][name] for name in common.UNTRAINED]
    for made in records:
        seeds = [statistics.mean(values) for values in zip(*made["kl"]["random"].values(), strict=True)]
        assert made["random_seeds"] == {
            "mean_by_seed": seeds,
            "standard_deviation": statistics.stdev(seeds),
            "min": min(seeds),
            "max": max(seeds),
        }
        for name, difference in made["minus_random"].items():
            by_text = made["kl"][name].items()
            each = [statistics.mean(kl) - statistics.mean(made["kl"]["random"][text]) for text, kl in by_text]
            assert difference["mean"] == pytest.approx(statistics.mean(each), abs=1e-9)
            low, high = difference["interval_95"]
            assert min(each) - 1e-9 <= low <= high <= max(each) + 1e-9, name
    assert f"{common.SEEDS} seeds of random: " in capsys.readouterr().out


def test_fidelity_of_some_rows(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "kl.json"
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *arguments(tiny, out), "--rows", "window", "recent"])
    fidelity.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert list(record["kl"]) == ["window", "recent"]
    assert record["minus_random"] is None and record["random_seeds"] is None
    assert record["minus_window"]["window"] == {"mean": 0.0, "interval_95": [0.0, 0.0]}
    difference = record["mean_kl"]["recent"] - record["mean_kl"]["window"]
    assert record["minus_window"]["recent"]["mean"] == pytest.approx(difference, abs=1e-12) and difference != 0
    assert "minus random" not in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["fidelity.py", *arguments(tiny, out), "--rows", "heads_and_window"])
    with pytest.raises(SystemExit):
        fidelity.main()
    said = capsys.readouterr().err
    assert "--rows='heads_and_window'" in said and "local block only" in said
