"""The archive of RULER's answers: its hashes are those on record, and the committed tables follow from it."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from apb_ds.report.curves import gather_curves
from apb_ds.report.pairing import compare_results
from apb_ds.report.results import read_results
from apb_ds.report.summary import summarise

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
ARCHIVE = RESULTS / "answers.tar.xz"
UNPACKED = "./outputs/answers/"  # where docs/results/README.md unpacks the archive
TABLES = sorted(str(file.relative_to(RESULTS)) for file in RESULTS.rglob("ruler_*.json"))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory / "answers"


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def directories_of(table: dict[str, Any]) -> list[str]:
    """Return the folders that a table was made from, below the archive's own."""
    if "against" in table:
        entries = [point for line in table["lines"] for point in line["points"]] + table["levels"]
    else:
        entries = table["jobs"]
    return [entry["directory"].removeprefix(UNPACKED) for entry in entries]


def recompute(table: dict[str, Any], answers: Path) -> dict[str, Any]:
    results = read_results([answers / directory for directory in directories_of(table)])
    content = gather_curves(results, table["against"]) if "against" in table else compare_results(results)
    found = json.loads(json.dumps(content, default=str))
    assert isinstance(found, dict)
    return found


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare tables: means to rounding, intervals to what another generator's resamples would change."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), where
        for name, value in expected.items():
            if name != "directory":
                assert_same(found[name], value, f"{where}/{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    elif isinstance(expected, float):
        tolerance = {"abs": 0.005} if "/interval/" in where else {"rel": 1e-9, "abs": 1e-12}
        assert found == pytest.approx(expected, **tolerance), where
    else:
        assert found == expected, where


def test_the_archive_and_its_files_have_the_hashes_on_record(answers: Path) -> None:
    assert digest(ARCHIVE) in (RESULTS / "README.md").read_text(encoding="utf-8")
    lines = (RESULTS / "answers.sha256").read_text(encoding="utf-8").splitlines()
    listed = {path: sha256 for sha256, path in (line.split(maxsplit=1) for line in lines)}
    found = {str(file.relative_to(answers.parent)): digest(file) for file in answers.rglob("*") if file.is_file()}
    assert found == listed


def test_every_folder_of_the_archive_is_in_a_table(answers: Path) -> None:
    used = {name for table in TABLES for name in directories_of(json.loads((RESULTS / table).read_text()))}
    assert used == {str(file.parent.relative_to(answers)) for file in answers.rglob("samples.jsonl")}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_follows_from_the_answers(answers: Path, name: str) -> None:
    table = json.loads((RESULTS / name).read_text())
    assert_same(recompute(table, answers), table)


def test_summaries_follow_from_the_answers(answers: Path) -> None:
    results = read_results(
        [answers / directory for directory in ("ruler_7800_cwe/dense", "ruler_7800_curves/hosts_32")]
    )
    for result in results:
        samples = [{**sample, "approximate": not result.is_exact_method} for sample in result.samples.values()]
        found = json.loads(json.dumps(summarise(samples)))
        assert_same(found, {name: result.summary[name] for name in found})


def test_a_changed_answer_changes_the_table(answers: Path) -> None:
    table = json.loads((RESULTS / "ruler_7800_cwe.json").read_text())
    results = read_results([answers / directory for directory in directories_of(table)])
    sample = next(iter(results[-1].samples.values()))
    sample["score"] = 1.0 - sample["score"]
    with pytest.raises(AssertionError, match=r"/pairs/\d+/difference"):
        assert_same(json.loads(json.dumps(compare_results(results), default=str)), table)
