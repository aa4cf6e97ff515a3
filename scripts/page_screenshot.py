"""Take the screenshot of the server's page that the documentation shows: two questions about the harbour's log.

Needs Chromium (Debian: apt-get install chromium); writes docs/results/server_page.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.browser import CONTROL, open_browser
from tests.serving_process import server_process

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "results" / "server_page.png"
DOCUMENT = ROOT / "examples" / "harbour" / "log.txt"
QUESTIONS = ("What is the code of the north gate?", "When does the ferry to Marn leave?")
ANSWER_S = 120.0


def main() -> None:
    settings = ("method.hosts=4", "serve.min_document=1024")
    with (
        tempfile.TemporaryDirectory() as profile,
        server_process(*settings) as address,
        open_browser(Path(profile)) as browser,
        browser.open(f"{address}/") as page,
    ):
        page.wait("document.querySelector('#model').textContent.includes('tokens')")
        page.choose("#file", DOCUMENT)
        page.wait("document.querySelector('#document').value")
        for index, question in enumerate(QUESTIONS):
            page.type("#question", question)
            page.press("Enter", CONTROL)
            page.wait(f"document.querySelectorAll('.numbers').length === {index + 1}", ANSWER_S)
        page.screenshot(FILE)
    print(f"{FILE.relative_to(ROOT)}: {FILE.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
