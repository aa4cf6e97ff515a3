"""The server's page in headless Chromium, as a person uses it."""

from __future__ import annotations

import json
import shutil
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CONTROL, MISSING, Browser, Page, chromium, open_browser
from tests.serving_process import server_process
from tests.tiny_checkpoint import TEMPLATE, save_checkpoint

pytestmark = [
    pytest.mark.launcher,
    pytest.mark.skipif(chromium() is None, reason=MISSING),
]

KEY = "a-key"
MIN_DOCUMENT = 200
DOCUMENT = "The light on the pier burns from dusk to dawn, and the keeper writes down every ship. " * 6
STRICT = "[roles must alternate] "
# Refuses two messages of a user in a row, for documents that begin with STRICT.
PICKY = (
    "{% if 'roles must alternate' in messages[0].content and messages|length > 1 and messages[1].role == 'user' %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # Without an end token, an answer is as long as it may be.
    checkpoint = save_checkpoint(tmp_path_factory.mktemp("model") / "tiny", template=PICKY, eos_token_id=None)
    settings = (f"serve.api_key={KEY}", f"serve.min_document={MIN_DOCUMENT}", "serve.default_new_tokens=2000")
    with server_process(f"model.path={checkpoint}", "method.hosts=2", *settings) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(address: str, browser: Browser) -> Iterator[Page]:
    """Yield the page without a key; check afterwards that it asked its own server alone, and reported no error."""
    with browser.open(f"{address}/") as found:
        yield found
        found.wait("true")  # reads what has been reported meanwhile
        assert found.requests and all(one.startswith(f"{address}/") for one in found.requests)
        assert found.errors == []


@pytest.fixture
def connected(page: Page) -> Page:
    page.wait("document.querySelector('#settings').open")
    assert page.evaluate("document.querySelector('#error').hidden && document.activeElement.id === 'key'")
    assert page.text("#model") == "Enter the server's API key."
    page.type("#key", KEY)
    page.evaluate("document.querySelector('#key').form.requestSubmit()")  # does not leave the page
    page.press("Tab")
    page.wait("document.querySelector('#model').textContent.startsWith('tiny')")
    _expect_refusals(page, 401)
    return page


def _expect_refusals(page: Page, *statuses: int) -> None:
    """Check that the browser has reported these statuses and nothing else, and forget them."""
    assert [one.split("status of ")[-1][:3] for one in page.errors] == [str(status) for status in statuses]
    page.errors.clear()


def _ask(page: Page, question: str, num_answers: int) -> dict[str, str]:
    """Ask by the keyboard; return the numbers below the answer once it has ended."""
    page.type("#question", question)
    page.press("Enter", CONTROL)
    page.wait(f"document.querySelectorAll('.numbers').length === {num_answers}")
    return _numbers(page)


def _numbers(page: Page) -> dict[str, str]:
    last = "[...document.querySelectorAll('.numbers')].at(-1).querySelectorAll('div')"
    return dict(page.evaluate(f"[...{last}].map((one) => [...one.children].map((part) => part.textContent))"))


def _shorten(page: Page, num_tokens: int) -> None:
    """Limit the next answers."""
    page.click("summary")
    page.type("#longest", str(num_tokens))


def _posts(page: Page) -> int:
    return sum(one.endswith("/v1/chat/completions") for one in page.requests)


def _health(address: str) -> Any:
    with urllib.request.urlopen(f"{address}/health") as response:
        return json.loads(response.read())


def test_a_second_question_about_a_document_finds_it_in_the_cache(connected: Page) -> None:
    page = connected
    _shorten(page, 12)
    # Every state that the page tells, in order.
    page.evaluate(
        "window.told = []; new MutationObserver(() => told.push(document.querySelector('#status').textContent))"
        ".observe(document.querySelector('#status'), { childList: true })"
    )
    page.type("#document", DOCUMENT)
    assert page.text("#size") == f"{len(DOCUMENT)} characters"

    first = _ask(page, "Who keeps <b>the light</b>?", 1)
    # The document and the question with the template's tokens, one for each byte.
    length = len("<s>") + len(DOCUMENT) + len("Who keeps <b>the light</b>?")
    assert int(first["Prompt"].replace(",", "")) > length - 10
    assert first["Cached"] == "0" and first["New"] == "12"
    assert first["First token"].endswith(" s") and first["Speed"].endswith(" tokens/s")
    assert first["Ended"] == "at the longest length"
    told = page.evaluate("told")
    assert told[0] == "Waiting…" and "Reading the document: 100%" in told and told[-1].startswith("Answered after")
    assert page.text(".question") == "Who keeps <b>the light</b>?"
    assert page.text(".answer p")
    assert page.evaluate("document.querySelector('#document').readOnly")
    assert "to change it, press New document" in page.text("#size")

    second = _ask(page, "And who pays?", 2)
    assert int(second["Cache hit"].replace(",", "")) >= len(DOCUMENT)
    assert page.text("#hits") == "Cache hits: 1 of 2"
    assert _posts(page) == 2

    page.evaluate("window.asked = []; window.confirm = (text) => (asked.push(text), asked.length > 1)")
    page.click("#new")
    assert page.text("#talk")
    page.click("#new")
    assert page.evaluate("asked.length") == 2
    assert page.evaluate("[...document.querySelectorAll('textarea')].map((one) => one.value + one.readOnly)") == [
        "false",
        "false",
    ]
    assert page.text("#talk") == ""
    page.click("#new")  # nothing would be lost
    assert page.evaluate("asked.length") == 2


def test_a_document_that_is_too_short_is_told(connected: Page) -> None:
    page = connected
    _shorten(page, 5)
    page.evaluate("document.querySelector('#temperature').value = ''")
    page.evaluate(
        "(() => { const real = fetch; window.fetch = (path, options) => {"
        "if (options.body) window.sent = JSON.parse(options.body); return real(path, options); }; })()"
    )
    page.type("#document", "A short one.")
    first = _ask(page, "Who?", 1)
    assert first["Cached"] == f"0 (the server keeps documents of {MIN_DOCUMENT} tokens and more)"
    assert page.evaluate("sent.temperature") == 0


def test_stop_ends_an_answer_at_the_server_too(connected: Page, address: str) -> None:
    page = connected
    page.type("#document", DOCUMENT)
    page.type("#question", "Who keeps the light?")
    page.click("#ask")
    page.wait("document.querySelector('.answer p')?.textContent.length > 5")
    assert _health(address)["running"] == 1
    page.click("#stop")
    page.wait("document.querySelector('#status').textContent.startsWith('Stopped after')")
    assert _numbers(page)["Ended"] == "stopped"
    deadline = time.monotonic() + 5
    while _health(address)["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)

    # What was said so far is part of the conversation.
    page.evaluate(
        "(() => { const real = fetch; window.fetch = async (path, options) => { if (!options.body) return real(path,"
        "options); window.sent = JSON.parse(options.body); return new Response('data: [DONE]\\n\\n'); }; })()"
    )
    page.type("#question", "And then?")
    page.press("Enter", CONTROL)
    page.wait("window.sent")
    said = [(one["role"], one["content"]) for one in page.evaluate("sent.messages")]
    assert said == [
        ("user", DOCUMENT),
        ("user", "Who keeps the light?"),
        ("assistant", page.text(".answer p")),
        ("user", "And then?"),
    ]


def test_a_wrong_key_is_told(page: Page) -> None:
    page.wait("document.querySelector('#settings').open")
    page.type("#key", "another-key")
    page.press("Tab")
    page.wait("!document.querySelector('#error').hidden")
    page.type("#question", "Who is there?")
    page.press("Enter", CONTROL)
    page.wait("document.querySelector('#status').textContent.startsWith('Failed after')")
    assert page.text("#error") == "Incorrect or missing API key."
    assert page.evaluate("document.activeElement.id") == "key"
    assert page.evaluate("document.querySelector('#question').value") == "Who is there?"
    assert page.evaluate("[{ ...sessionStorage }, { ...localStorage }, document.cookie]") == [
        {"api_key": "another-key"},
        {},
        "",
    ]
    _expect_refusals(page, 401, 401, 401)


def test_a_template_that_wants_roles_to_alternate_gets_parts(connected: Page) -> None:
    page = connected
    _shorten(page, 5)
    page.type("#document", STRICT + DOCUMENT)
    _ask(page, "Who keeps the light?", 1)
    assert _posts(page) == 2
    second = _ask(page, "And then?", 2)
    assert int(second["Cache hit"].replace(",", "")) >= len(STRICT + DOCUMENT)
    assert _posts(page) == 3
    _expect_refusals(page, 400)


def test_a_document_that_is_too_long_is_told(connected: Page) -> None:
    page = connected
    page.type("#document", DOCUMENT * 10)
    page.type("#question", "Who keeps the light?")
    page.press("Enter", CONTROL)
    page.wait("!document.querySelector('#error').hidden")
    assert "maximum context length is 4096 tokens" in page.text("#error")
    assert page.text("#talk") == "" and not page.evaluate("document.querySelector('#document').readOnly")
    _expect_refusals(page, 400)


def test_files_are_chosen_and_dropped(connected: Page, tmp_path: Path) -> None:
    page = connected
    chosen, dropped, binary = (tmp_path / name for name in ("chosen.txt", "dropped.md", "binary.txt"))
    chosen.write_text("Ünïcode")
    dropped.write_text("# Dropped")
    binary.write_bytes(b"\0\1")
    page.choose("#file", chosen)
    page.wait("document.querySelector('#document').value === 'Ünïcode'")
    assert page.text("#size") == "chosen.txt: 7 characters"
    page.drop("#document", dropped)
    page.wait("document.querySelector('#document').value === '# Dropped'")
    assert page.text("#size") == "dropped.md: 9 characters"
    page.drop("#talk", binary)
    page.wait("!document.querySelector('#error').hidden")
    assert page.text("#error") == "binary.txt is not a text file."
    assert page.evaluate("document.querySelector('#document').value") == "# Dropped"


def test_it_fits_small_screens_and_follows_the_colour_scheme(connected: Page) -> None:
    page = connected
    colours = []
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(247, 246, 243)", "rgb(25, 26, 24)"]
    page.resize(320, 640)
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    fields = "[...document.querySelectorAll('textarea, input')]"
    assert page.evaluate(f"{fields}.every((one) => one.labels.length || one.ariaLabel)")


def test_a_missing_browser_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="apt-get install chromium"), open_browser(tmp_path):
        pass
