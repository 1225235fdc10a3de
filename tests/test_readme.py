"""The pages beside the code, read as a newcomer reads them.

Every command in them goes through the real parser, so that a flag that is gone fails here. The tours of README.md and
`cli/README.md` run from beginning to end on a tiny teacher and text, in this process, and so do the README's Python
examples. Links, paths and flags that are named must exist, and the picture must be what its script draws.

How blocks are marked: `console` is run, `sh` and `bash` are only parsed, as are lines of `text` that begin with `$`. A
`yaml` block whose first line is a comment with a file name is that file. (The examples of the store format are run by
`test_store_format.py`, those of the Python interface by the test of its own page.)
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import tyro
import yaml

from cli import kdcache, kdeval, kdtrain, options
from cli.cache_build import BuildFlags
from cli.cache_derive import DeriveFlags
from cli.cache_drop import DropFlags
from cli.cache_import import ImportFlags
from cli.cache_info import InfoSettings
from cli.cache_plan import PlanSettings
from cli.cache_verify import VerifySettings
from cli.demo import DemoSettings
from cli.eval_compare import CompareSettings
from cli.eval_export import ExportFlags
from cli.eval_report import ReportSettings
from cli.train_flags import TrainFlags
from student_train.evaluate.fidelity.settings import FidelitySettings
from student_train.evaluate.finetune.settings import FinetuneSettings
from student_train.evaluate.latency.settings import LatencySettings
from student_train.evaluate.lm_eval.settings import LmEvalSettings
from student_train.evaluate.perplexity.settings import PerplexitySettings
from student_train.evaluate.trim.settings import TrimSettings
from tests.student_train.evaluate.causal_models import make_causal

ROOT = Path(__file__).resolve().parents[1]
README, COMMANDS_PAGE = ROOT / "README.md", ROOT / "cli" / "README.md"
FOLDERS = ("teacher_cache", "student_train", "cli", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("README.md"))])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENTRIES = {"kdcache": kdcache.main, "kdtrain": kdtrain.main, "kdeval": kdeval.main}
FLAGS_OF: dict[str, type[Any]] = {
    "kdcache build": BuildFlags,
    "kdcache import": ImportFlags,
    "kdcache plan": PlanSettings,
    "kdcache info": InfoSettings,
    "kdcache verify": VerifySettings,
    "kdcache derive": DeriveFlags,
    "kdcache drop": DropFlags,
    "kdtrain": TrainFlags,
    "kdeval fidelity": FidelitySettings,
    "kdeval finetune": FinetuneSettings,
    "kdeval perplexity": PerplexitySettings,
    "kdeval trim": TrimSettings,
    "kdeval lm-eval": LmEvalSettings,
    "kdeval latency": LatencySettings,
    "kdeval export": ExportFlags,
    "kdeval compare": CompareSettings,
    "kdeval report": ReportSettings,
}
OF_ALL = {"--config", "--debug", "--help", "--version", "--completion", "--quiet", "--verbose"}
OF_OTHERS = set(
    "--flag --nproc-per-node --nodes --ntasks-per-node --gpus-per-node --signal --requeue --array --gpus --time "
    "--open-mode".split()
)
"""Of launchers, and one that is any."""

# what makes the tours small: flags that are added where the page does not give them
SMALLER = {
    "kdcache build": {"--max-rows": "40", "--seq-len": "24", "--block-rows": "8"},
    "kdcache plan": {"--max-rows": "40", "--seq-len": "24", "--block-rows": "8"},
    "kdtrain": {"--steps": "2", "--batch-size": "8"},
    "kdeval finetune": {"--epochs": "0.5", "--max-length": "16"},
    "kdeval latency": {
        "--runs": "3", "--lengths": "16", "--batch-sizes": "1", "--threads": "1", "--backends": "pytorch",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    text = page.read_text()
    found = [Block(page, text[: match.start()].count("\n") + 1, match[1], match[2]) for match in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]


def lines_typed(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words, without comments and what a shell does with their output."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "text":
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        words = shlex.split(line, comments=True)
        ends = [number for number, word in enumerate(words) if word in ("|", ">", ">>", "&&")]
        if words:
            yield words[: ends[0]] if ends else words


def ours(words: list[str]) -> list[str] | None:
    """The words from `kdcache`, `kdtrain` or `kdeval` on, also where a launcher starts it; None of other commands."""
    if words[0] in ENTRIES:
        return words
    modules = [number for number, word in enumerate(words) if word.removeprefix("cli.") in ENTRIES and "." in word]
    return [words[modules[0]].removeprefix("cli."), *words[modules[0] + 1 :]] if modules else None


def named(words: list[str]) -> str:
    """`kdcache build`, `kdtrain`."""
    return words[0] if words[0] == "kdtrain" else " ".join(words[:2])


class ParsedError(Exception):
    """A command has read its flags, and goes no further."""


def read_flags(command: list[str]) -> int | str:
    """Start a command that stops when it has read its flags: `read`, or the exit code that it ends with before."""
    try:
        return ENTRIES[command[0]](command[1:])
    except ParsedError:
        return "read"
    except SystemExit as refusal:
        return str(refusal.code)


def test_every_command_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_of = options.settings_of

    def read_and_stop(*args: Any) -> None:
        settings_of(*args)
        raise ParsedError

    monkeypatch.setattr(options, "settings_of", read_and_stop)
    monkeypatch.chdir(tmp_path)
    seen = set()
    for page in PAGES:
        write_files(page, tmp_path)
        for block in blocks(page, "console", "sh", "bash", "text"):
            for words in lines_typed(block):
                if (command := ours(words)) is not None:
                    assert read_flags(command) == "read", f"{block}: {shlex.join(words)}"
                    seen.add(named(command))
    assert seen == FLAGS_OF.keys(), "every command has an example"


def write_files(page: Path, folder: Path) -> None:
    for block in blocks(page, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", block.text):
            (folder / name[1]).parent.mkdir(exist_ok=True)
            # a student that the tiny teacher can have
            (folder / name[1]).write_text(block.text.replace("6x384", "2x32"))


@pytest.fixture
def workplace(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Where a newcomer types: the text and the files that pages name are there, under these names."""
    shutil.copy(tiny_corpus, tmp_path / "text.txt")
    (tmp_path / "xlm-roberta-large").symlink_to(tiny_teacher("xlm-roberta"))
    for name, count in (("train", 32), ("dev", 8)):
        lines = [f"{('babo', 'dabo')[number % 2]} bada\t{number % 2}" for number in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    make_causal(tmp_path / "smollm2-135m", "llama")
    listed = {str(number): {"logprob": -1.5, "rank": number, "decoded_token": "a"} for number in (1, 2, 3)}
    answer = {"prompt_token_ids": [3, 1, 2], "prompt_logprobs": [None, listed, listed]}
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(answer)}\n" * 3)
    question = {"question": "A dog", "choices": ["barks", "sings"], "answer": 0}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "animals.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [README, COMMANDS_PAGE], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tour_runs(page: Path, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_files(page, workplace)
    run = set()
    for block in blocks(page, "console"):
        for words in lines_typed(block):
            if (command := ours(words)) is None:
                continue
            added = SMALLER.get(named(command), {}).items()
            more = [word for flag, value in added if flag not in command for word in (flag, value)]
            code = ENTRIES[command[0]]([*command[1:], *more])
            assert code == 0, f"{block}: {shlex.join([*words, *more])} ends with {code}: {capfd.readouterr().err}"
            run.add(named(command))
    assert (workplace / "student" / "model.safetensors").stat().st_size > 0
    assert "fidelity" in (workplace / "student" / "report.html").read_text()
    assert run == FLAGS_OF.keys() if page == COMMANDS_PAGE else len(run) == 4


def test_the_python_examples_run(workplace: Path) -> None:
    names: dict[str, Any] = {}
    examples = blocks(README, "python")
    for block in examples:
        text = re.sub(r"\bsteps=[\d_]+", "steps=2", block.text)
        exec(compile(text, str(block), "exec"), names)
    assert examples and (workplace / "cache.zarr" / "seal.json").exists()


def prose(page: Path) -> str:
    """A page without its blocks of code, every line where it was."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that a forge gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in PAGES:
        links = re.findall(r"\]\(([^)\s]+)\)|\bsrc=\"([^\"]+)\"", prose(page))
        for link in ("".join(pair) for pair in links):
            if link.startswith("https://"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert wrong == []


def code_in(page: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(page))


def test_files_that_are_named_exist() -> None:
    """`tests/test_house.py`, `layer_map.py`: below the page's folder or one around it. Capitals stand for any name."""
    path = re.compile(r"[\w./-]*\w\.(?:py|toml|cff)\b")
    wrong = []
    for page in PAGES:
        places = [place for place in page.parents if place.is_relative_to(ROOT)]
        places += [ROOT / "teacher_cache", ROOT / "student_train"]
        wrong += [
            f"{page.relative_to(ROOT)}: {name}"
            for code in code_in(page)
            for name in path.findall(code)
            if "NAME" not in name and not any((place / name).exists() for place in places)
        ]
    assert wrong == []


def flags_of(settings: type[Any]) -> set[str]:
    named = {field.name.replace("_", "-"): field.default is True for field in fields(settings)}
    return {f"--{name}" for name in named} | {f"--no-{name}" for name, is_on in named.items() if is_on}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_that_are_named_exist(page: Path) -> None:
    """Of our commands, or of a benchmark."""
    known = set().union(*map(flags_of, [*FLAGS_OF.values(), DemoSettings]), OF_ALL, OF_OTHERS)
    scripts = "".join(script.read_text() for script in (ROOT / "benchmarks").glob("*.py"))
    found = {flag for code in code_in(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", code)}
    assert [flag for flag in sorted(found - known) if f'"{flag}"' not in scripts] == []


@pytest.mark.parametrize("command", FLAGS_OF)
def test_the_reference_names_every_flag(command: str) -> None:
    text = COMMANDS_PAGE.read_text()
    section = re.search(rf"^## {command}\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"cli/README.md has no heading {command!r}"
    settings = FLAGS_OF[command]
    hints = get_type_hints(settings, include_extras=True)
    wanted = {
        "--" + field.name.replace("_", "-")
        for field in fields(settings)
        if tyro.conf.Positional not in getattr(hints[field.name], "__metadata__", ())
    }
    if command == "kdcache plan":  # "takes the flags of `build`"
        wanted -= flags_of(BuildFlags) - {"--json"}
    missing = {flag for flag in wanted if not re.search(rf"{flag}\b(?!-)", section[1])}
    assert missing == set()


def test_benchmarks_are_called_with_flags_that_they_have() -> None:
    further = flags_of(TrainFlags)
    for page in PAGES:
        for block in blocks(page, "console", "sh", "bash"):
            for words in lines_typed(block):
                if words[0] == "python" and words[1].startswith("benchmarks/"):
                    script = (ROOT / words[1]).read_text()
                    handed_on = further if "parse_known_args" in script else set()
                    for flag in (word for word in words if word.startswith("--")):
                        assert f'"{flag}"' in script or flag in handed_on, f"{block}: {words[1]} has no {flag}"


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        typed = [words for block in blocks(page, "console", "sh", "bash") for words in lines_typed(block)]
        for words in [*typed, *(code.split() for code in code_in(page))]:
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.relative_to(ROOT)}: make {words[1]}"


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= 2000


def test_the_walk_names_every_folder() -> None:
    tree = next(block.text for block in blocks(README, "text") if block.text.startswith("teacher_cache/"))
    walked: dict[str, set[str]] = {}
    for line in tree.splitlines():
        name = line.split()[0].rstrip("/")
        if line.startswith("  "):
            walked[top].add(name)  # noqa: F821
        else:
            top = name
            walked[top] = set()
    for package in ("teacher_cache", "student_train"):
        assert walked[package] == {face.parent.name for face in (ROOT / package).glob("*/__init__.py")}
    assert walked.keys() == {"teacher_cache", "student_train", "cli", "tests", "benchmarks"}


def test_the_picture_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "draw_data_way.py"))
    drawn, committed = script["draw"](), script["PICTURE"].read_text()
    assert drawn == committed, "run `python benchmarks/draw_data_way.py`, and look at the picture"
    assert script["PICTURE"].relative_to(ROOT).as_posix() in README.read_text()


def test_the_citation_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert f"version = {{{project['version']}}}" in README.read_text()
    assert citation["references"][0]["doi"] in README.read_text()
