"""Every model type of transformers is exact, or refused for its true reason; see docs/models.md."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.conformance import checks
from tests.conformance.builder import WINDOW, build, tiny_config
from tests.conformance.checks import DOCUMENT_LENGTH, Verdict, judge, verdict_on
from tests.conformance.expected import CATEGORIES, EXPECTED, UNBUILT, WRAPPER_CATEGORIES, category_of
from tests.conformance.settings import SETTINGS, VARIANTS
from tests.conformance.write import CAUSAL, MULTIMODAL, PAGE, page_with, render

pytestmark = [pytest.mark.models, pytest.mark.filterwarnings("ignore")]

# Other versions have other types, and some types otherwise: there, any of the reasons will do.
IS_KNOWN_VERSION = f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(verdict: Verdict, category: str | None, unbuilt: str | None, is_listed: bool) -> None:
    """Assert that a verdict is the expected one.

    Parameters
    ----------
    category : of the refusal; None for a type that is exact
    unbuilt : pattern of transformers' error, for a type that it does not build
    is_listed : whether a type that is not exact must have one of these
    """
    if unbuilt is not None:
        assert verdict.kind == "not built" and re.search(unbuilt, verdict.reason), verdict
    elif category is not None and is_listed:
        assert verdict.kind == "refused", f"not refused, but {verdict}: take it out of expected.py"
        assert re.search(CATEGORIES[category].pattern, verdict.reason), f"not for {category}: {verdict.reason}"
    elif is_listed:
        assert verdict == Verdict("exact")
    else:
        is_refused = verdict.kind == "refused" and category_of(verdict.reason)
        assert verdict.kind in ("exact", "not built") or is_refused, verdict


@pytest.mark.parametrize("name", [*CAUSAL, *VARIANTS])
def test_a_type_is_exact_or_refused_for_its_reason(name: str) -> None:
    unbuilt = UNBUILT.get(name) if IS_KNOWN_VERSION else None
    check(verdict_on(name), EXPECTED.get(name), unbuilt, IS_KNOWN_VERSION)


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_multimodal_type_is_exact_or_refused_for_its_reason(name: str) -> None:
    check(verdict_on(name, is_wrapper=True), WRAPPER_CATEGORIES.get(name), None, IS_KNOWN_VERSION)


def test_the_page_is_what_this_run_gives() -> None:
    if not IS_KNOWN_VERSION:
        pytest.skip(f"docs/models.md was not written with transformers {transformers.__version__}")
    message = "run python -m tests.conformance.write"
    assert page_with(render()) == PAGE.read_text(encoding="utf-8"), message


def test_expected_types_exist() -> None:
    if IS_KNOWN_VERSION:
        assert {*EXPECTED, *UNBUILT} <= {*CAUSAL, *VARIANTS}


def test_a_tiny_model_has_every_kind_of_layer_and_a_short_window() -> None:
    if not IS_KNOWN_VERSION:
        pytest.skip("settings are for the version of docs/models.md")
    for name in CAUSAL:
        try:
            default = CONFIG_MAPPING[name]()
        except Exception:  # a config without defaults: its settings are written by hand
            continue
        tiny = tiny_config(CONFIG_MAPPING[name], SETTINGS.get(name, {}))
        for full, small in zip(_parts(default), _parts(tiny), strict=True):
            kinds, kept = (set(getattr(config, "layer_types", None) or ()) for config in (full, small))
            assert kinds <= kept, f"{name} lacks {kinds - kept}"
            window = getattr(small, "sliding_window", None) if "sliding_attention" in kept else None
            assert window is None or WINDOW // 2 <= window <= WINDOW < DOCUMENT_LENGTH / 4, f"{name}: {window}"


def _parts(config: transformers.PretrainedConfig) -> list[transformers.PretrainedConfig]:
    return [config, *(part for part in vars(config).values() if isinstance(part, transformers.PretrainedConfig))]


def test_the_checks_see_what_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = {"hosts": 4, "anchor_length": 0, "compression_ratio": 2}
    monkeypatch.setattr(checks, "CONFIGS", {"one host a forward": lossy})
    verdict = judge(build("llama"))
    assert verdict.kind == "wrong" and "logits are off" in verdict.reason


def test_the_checks_see_one_token_too_many_in_a_window() -> None:
    """A plain model with another window stands for an engine that applies the window wrongly."""
    model = build("mistral")
    ids = torch.cat(checks.request_ids(), dim=1)
    with torch.no_grad():
        expected = model(ids).logits
        model.config.sliding_window += 1
        assert float((model(ids).logits - expected).abs().max() / expected.abs().max()) > 100 * checks.TOLERANCE
