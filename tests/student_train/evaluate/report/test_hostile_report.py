"""A report of records in which every text is meant to act in a page or on a terminal: it is shown, and does nothing.

The page is parsed, and opened in a browser (Chromium without a window) where there is one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from student_train.evaluate.report.report import make_report
from tests.student_train.evaluate.left_records import finetuned, timed, write
from tests.student_train.evaluate.reports import make_report as make_fidelity

SCRIPT = "<script>document.title='pwned'</script>"
IMAGE = "<img src=x onerror=\"document.title='pwned'\">"
BREAKING = "\"'></p></pre></title></style><svg onload=document.title='pwned'>&lt;"
STEERING = "$\\frac{$\x1b[31mred\x00\x07\x9b2J\u202ereversed\u2066\n\r"
NASTY = f"{SCRIPT}{IMAGE}{BREAKING}{STEERING}"
ALLOWED = frozenset(
    "html head meta title style body main h1 h2 h3 p div span b dl dt dd section details summary figure figcaption img "
    "table thead tbody tr th td pre".split()
)


class Elements(HTMLParser):
    """What a page has: elements, attributes, addresses, words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def page(make_run: Any) -> Path:
    """The report of a run whose name and records are nasty throughout."""
    run: Path = make_run(f"{IMAGE.replace('/', '')}&lt;\x1b[31m", mapping=NASTY, cache=[NASTY])
    record = json.loads((run / "provenance.json").read_text())
    record["cache"] |= {"path": NASTY, "identity_sha256": NASTY, "rows": 9}
    record["cache"]["teacher"] = {"name": NASTY, "weights_sha256": NASTY}
    record |= {
        "command": f"kdtrain {NASTY}", "created": NASTY, "git_revision": NASTY, "software": {NASTY: NASTY},
        "student": {"description": NASTY}, "objective": {NASTY: {NASTY: [NASTY], "pairs": [[NASTY, 2]]}},
    }  # fmt: skip
    write(run / "provenance.json", record)
    finetuned(run, "sst2", [0.5], metric=NASTY, by_test={NASTY: {"scores": [0.5]}}, examples={NASTY: 1})
    score = json.loads((run / "finetune-sst2.json").read_text())
    write(run / "finetune-sst2.json", {**score, "task": NASTY})
    timed(run, 3.0, hardware={"cpu": NASTY})
    latency = json.loads((run / "latency.json").read_text())
    for entry in latency["measurements"]:
        entry |= {"backend": NASTY, "dtype": NASTY, "device": NASTY}
    write(run / "latency.json", latency)
    fidelity = replace(make_fidelity(), cache=NASTY, notes=(NASTY,))
    write(run / "fidelity.json", {"evaluation": "fidelity", **fidelity.to_json(), "command": NASTY})
    step = {"step": 1, "loss": 1.0, NASTY: 1.0, "mha": 1.0, "lr": 0.1, "tokens": 9, "seconds": 0.5, "wait": 0.0}
    lines = [{"step": 0, "valid_loss": 2.0, f"valid_{NASTY}": 2.0}, step]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run.parent / "report.html"
    path.write_text(make_report(str(run)), encoding="utf-8")
    return path


def check(text: str) -> Elements:
    found = Elements(text)
    assert found.tags <= ALLOWED, found.tags - ALLOWED
    assert not [name for name in found.attributes if name.startswith("on")]
    assert all(address.startswith(("#", "data:image/")) for address in found.addresses)
    assert found.words.count("document.title='pwned'") > 20, "it is shown, not left out"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    return found


def test_a_page_of_hostile_records_has_the_elements_of_any_other(page: Path) -> None:
    check(page.read_text(encoding="utf-8"))


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[[Path], str]:
    """Opens a page and gives what it is then."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no chromium or google-chrome to open a report in")
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    more = ["--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]

    def opened(page: Path) -> str:
        command = [browser, *flags.split(), *more, "--dump-dom", page.as_uri()]
        environment = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, timeout=120, check=True, env=environment).stdout.decode()

    return opened


def test_nothing_in_a_page_of_hostile_records_runs_in_a_browser(page: Path, open_page: Callable[[Path], str]) -> None:
    dom = open_page(page)
    check(dom)
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title and title[1].endswith("report") and title[1] != "pwned"
    # and the same page does run what is not escaped: else nothing would be shown by this
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{SCRIPT}</main>"), encoding="utf-8")
    assert "<title>pwned</title>" in open_page(page)


MEASURE = """<script>
onload = () => parent.postMessage(`${document.documentElement.scrollWidth}`, "*")
</script></main>"""
FRAME = """<!DOCTYPE html><pre id="said"></pre>
<script>onmessage = event => { document.getElementById("said").textContent = event.data }</script>
<iframe src="report.html" style="width: 390px; height: 800px; border: 0"></iframe>"""


def test_a_page_is_no_wider_than_a_phone(page: Path, open_page: Callable[[Path], str]) -> None:
    """With everything unfolded, names without a space in them among it; a window cannot be as narrow as a frame."""
    text = page.read_text(encoding="utf-8").replace("<details>", "<details open>").replace("</main>", MEASURE)
    page.write_text(text, encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME, encoding="utf-8")
    said = re.search('<pre id="said">([0-9]+)</pre>', open_page(frame))
    assert said and int(said[1]) <= 390
