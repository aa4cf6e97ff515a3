"""The pages: links and anchors lead somewhere, README reaches every page, names in backticks and settings exist."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from apb_ds.config import APBConfig

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs" / "results" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
CARDS = sorted({*(ROOT / "docs" / "results").glob("*/**/README.md"), *(ROOT / "apb_ds").glob("**/README.md")})
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A file or folder of the repository, as pages write it; not a pattern, and not a link to elsewhere.
PATH_NAME = re.compile(r"`((?:apb_ds|benchmarks|configs|docs|examples|hydra_plugins|launch|scripts|tests)/[\w./-]*)`")
PLANNED = {"apb_ds/weights/", "apb_ds/serving/"}  # docs/architecture.md says where they will be


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub makes it."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, those in fenced blocks left out."""
    return {slug(match) for match in re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)}


def dead_links(page: Path, text: str) -> Iterator[str]:
    """Yield the relative links of a page that lead to no file, or to no heading of one."""
    for link in LINK.findall(FENCED.sub("", text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve()
        if "://" in link or (path and target.exists() and not anchor):
            continue
        found = text if not path else target.read_text(encoding="utf-8") if target.is_file() else ""
        if anchor not in anchors(found):
            yield link


def linked_pages(page: Path) -> set[Path]:
    links = LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    return {(page.parent / link.partition("#")[0]).resolve() for link in links if "://" not in link}


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert list(dead_links(page, page.read_text(encoding="utf-8"))) == []


def test_dead_links_are_found() -> None:
    alive = "[a](#its-here-now) [b](README.md) [c](docs) [d](docs/support.md#models) [e](https://example.org/x.md)"
    dead = "[f](#there) [g](no.md) [h](docs/support.md#x) [i](#not-a-heading)"
    text = f"# A page\n## It's `here`: now\n{alive}\n{dead}\n```\n# not a heading\n[j](nowhere.md)\n```\n"
    assert list(dead_links(ROOT / "PAGE.md", text)) == ["#there", "no.md", "docs/support.md#x", "#not-a-heading"]


def test_readme_links_every_page() -> None:
    assert set(PAGES) - {ROOT / "README.md"} <= linked_pages(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    named = set(PATH_NAME.findall(page.read_text(encoding="utf-8"))) - PLANNED
    if page.name == "CHANGELOG.md":
        named = set()  # of their time
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_architecture_names_files_of_every_folder() -> None:
    named = PATH_NAME.findall((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    packages = {f"apb_ds/{folder.name}/" for folder in (ROOT / "apb_ds").iterdir() if (folder / "__init__.py").exists()}
    assert packages - set(named) == set()


def settings() -> Iterator[tuple[str, str]]:
    """Yield (section, key) of every setting that a user can give."""
    yield from (("method", field.name) for field in dataclasses.fields(APBConfig) if field.init)
    configs = ROOT / "configs"
    sections = {
        "task": sorted((configs / "task").glob("*.yaml")),
        "model": [configs / "model" / "smollm2.yaml"],
        "parallel": [configs / "parallel" / "default.yaml"],
    }
    for section, files in sections.items():
        for file in files:
            yield from ((section, key) for key in yaml.safe_load(file.read_text()) if key not in ("name", "defaults"))
    for file in sorted(configs.glob("*.yaml")):
        for section, values in yaml.safe_load(file.read_text()).items():
            if section in ("bench", "eval", "serve", "train"):
                yield from ((section, key) for key in values)


def described_settings(text: str) -> Iterator[tuple[str, str]]:
    """Yield (section, key) of every setting in the first column of a table, by the page's second-level headings."""
    sections = {
        "Method": "method",
        "Model": "model",
        "Tasks": "task",
        "Benchmark": "bench",
        "Server": "serve",
        "Training": "train",
    }
    section = ""
    for line in text.splitlines():
        if line.startswith("## "):
            section = sections.get(line[3:], "")
        if line.startswith("| `"):
            for name in re.findall(r"`([\w.]+)`", line.split(" | ")[0]):
                prefix, _, key = name.rpartition(".")
                yield prefix or section, key


def test_settings_page_has_every_setting() -> None:
    given = set(settings())
    described = set(described_settings((ROOT / "docs" / "settings.md").read_text(encoding="utf-8")))
    assert len(given) > 100
    assert sorted(given - described) == []
