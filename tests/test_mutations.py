"""Stores changed at one place at random, with a hash chain that is right: the same results, or one message.

Any field of any JSON object is dropped or replaced, numbers of arrays and constants are changed (`tests/mutations.py`).
Then `info`, `verify`, `derive`, `kdtrain`, `kdeval fidelity` and `kdeval report` run in this process. Each must end in
time and in bounded memory with exit 1 and one message, or give what it gives of the unchanged store. A traceback is
never right, nor is a number that is none. What may differ from the unchanged store where a change is taken:

- `info` shows the manifest, so the changed field itself may differ there, what is derived from it, and the size of the
  objects in bytes. It may also show blocks as missing, as it does where they are lost.
- Whether rows were held out of the student's training is known by what the manifest says of the store (its seed, the
  share of masked tokens). Of another one it is not known, and `fidelity` and `report` say so; the numbers are the same.
- Other values of a few fields make another store by contract (`OTHER_STORES`), which is none the worse for it. The
  commands named there may give other numbers, and only that they are numbers is checked.
- The same holds for numbers of arrays and constants, where they are such as a build could have written, and for the
  teacher's own files: whoever makes the store says what the teacher is. Codes of vectors are not tried, as any are
  right; `info`, which reads none of it, must still say the same.

KDCACHE_MUTATIONS says how many changes are tried, KDCACHE_SEED which.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cli import kdcache, kdeval, kdtrain
from student_train.run_files import METRICS_NAME
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from tests.causal_models import save_teacher
from tests.mutations import KINDS, Change, Places
from tests.outcomes import NOISE_BYTES, STEERING, Outcome, leaves, run_one
from tests.sinks import plant_causal_sinks, plant_sinks

MUTATIONS = int(os.environ.get("KDCACHE_MUTATIONS", "100"))
FEW = MUTATIONS <= 100
EVERY = 7 if FEW else 1  # has no divisor in common with the number of kinds, so that each of them comes
"""Of so many changed stores one is given to a command that takes longer."""
SEED = int(os.environ.get("KDCACHE_SEED", "0"))
READING = ("derive", "fidelity", "report", "train")
OTHER_STORES: Mapping[str, tuple[str, ...]] = {
    # attention that is computed from a hidden state has no arrays of its own, so that a store may hold it or not
    "manifest.targets.attention": ("fidelity", "report", "train"),
    "manifest.targets.attention.*": ("fidelity", "report", "train"),
    # at which the distribution is compared
    "manifest.temperature": ("fidelity", "train"),
}
CAUSAL = {"positions": "share:0.5", "targets": "logits,hidden,attention"}
DERIVED = ("declared_errors.", "groups.", "bits_per_value.", "bytes_per_token.")
"""What `info` says of the manifest beside itself."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A store, a student of it, what each command gives of it, and how much memory that takes."""

    store: Path
    student: Path
    places: Places
    results: dict[str, Any] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)


def build(teacher: Path, corpus: Path, out: Path, **options: Any) -> Path:
    sizes = {"seq_len": 24, "max_rows": 24, "block_rows": 8, "k": 8, "attention_layer": 3, "device": "cpu"}
    build_cache(BuildSettings(teacher=str(teacher), corpus=(str(corpus),), out=str(out), **{**sizes, **options}))
    return out


@pytest.fixture(scope="module")
def originals(
    tiny_teacher: Callable[..., Path],
    tiny_corpus: Path,
    causal_corpus: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[Original]:
    """One store in the codecs by default, with sinks; one with draws, other codecs, a later extension; a causal one."""
    folder = tmp_path_factory.mktemp("originals")
    teacher = Path(shutil.copytree(tiny_teacher(), folder / "teacher"))
    plant_sinks(teacher, token_id=2)
    first = build(teacher, tiny_corpus, folder / "first.zarr", layers="2,4", precision="nmse:1e-1")
    assert (first / "hidden/2/sinks").is_dir()
    other = folder / "second.zarr"
    options: dict[str, Any] = {"logits": "sample", "k": 30, "precision": "int8", "rows": "document"}
    build(tiny_teacher(), tiny_corpus, other, layers="2", **options)
    build(tiny_teacher(), tiny_corpus, other, layers="2,4", **options)
    decoder = save_teacher(folder / "decoder", num_key_value_heads=4)
    plant_causal_sinks(decoder, token_id=5)
    causal = build(decoder, causal_corpus, folder / "third.zarr", layers="2,4", precision="nmse:1e-1", **CAUSAL)
    for path in ("segments/starts", "next/kept", "hidden/2/sinks"):
        assert list(causal.glob(path)), path
    found = []
    for number, store in enumerate((first, other, causal)):
        student = folder / f"student-{number}"
        assert kdtrain.main([*training(store), "--out", str(student)]) == 0
        # curves and bars are no matter of the store, and take a report's time
        (student / METRICS_NAME).unlink()
        found.append(Original(store=store, student=student, places=Places(store, f"{SEED}-{number}")))
    return found


def training(store: Path) -> list[str]:
    return [
        "--cache", str(store), "--method", "mha+hs+od", "--weights", "1,0.1,1", "--steps", "1", "--batch-size", "4",
        "--device", "cpu", "--valid-share", "0.2", "--warmup", "1", "--mapping", "1:2,2:4",
    ]  # fmt: skip


def commands(store: Path, student: Path, folder: Path) -> dict[str, Callable[[], int]]:
    at, cache = str(store), ["--cache", str(store)]
    measured = ["--student", str(student)]
    return {
        "info": lambda: kdcache.main(["info", at, "--json"]),
        "verify": lambda: kdcache.main(["verify", at]),
        "derive": lambda: kdcache.main(["derive", at, str(folder / "derived.zarr"), "--targets", "hidden"]),
        "train": lambda: kdtrain.main([*training(store), "--out", str(folder / "trained")]),
        "fidelity": lambda: kdeval.main(["fidelity", *measured, *cache, "--json"]),
        "report": lambda: kdeval.main(["report", str(student), *cache, "--out", str(folder / "report.html")]),
    }


def result_of(name: str, folder: Path, printed: str) -> Any:
    """What a command has given, without paths, times, and what names the store instead of saying what is in it."""
    if name == "info":
        found = json.loads(printed)
        for key in ("path", "other_bytes", "total_bytes"):
            del found[key]
        return dict(leaves(found))
    if name == "verify":
        return re.sub(r"[\d.,]+ ?[kMG]?i?B", "", printed.replace(str(folder), ""))
    if name == "derive":
        derived = folder / "derived.zarr"
        return {
            path.relative_to(derived).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(derived.rglob("*"))
            if path.is_file() and ("c" in path.parts or path.parent.name == "c")
        }
    if name == "train":
        records = [json.loads(line) for line in (folder / "trained" / METRICS_NAME).read_text().splitlines()]
        kept = [
            {key: value for key, value in one.items() if key not in ("seconds", "wait", "memory")} for one in records
        ]
        weights = (folder / "trained" / "model.safetensors").read_bytes()
        return {"records": kept, "weights": hashlib.sha256(weights).hexdigest()}
    if name == "fidelity":
        found = json.loads(printed)
        return {key: found[key] for key in ("relations", "hidden", "distribution", "first_row", "last_row", "tokens")}
    text = (folder / "report.html").read_text()
    section = re.search(r'<section id="relations">.*?</section>', text, re.DOTALL)
    assert section
    return section[0].replace("held-out row", "row")


def measure(original: Original, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the commands give of the unchanged store; of many twice, as what differs by itself is no result."""
    for times in range(1 if FEW else 2):
        at = folder / str(times)
        store = Path(shutil.copytree(original.store, at / "cache.zarr"))
        for name, run in commands(store, original.student, at).items():
            outcome = run_one(name, run, capsys)
            assert outcome.code == 0, f"{name}: {outcome}"
            original.bytes[name] = max(original.bytes.get(name, 0), outcome.bytes)
            result = result_of(name, at, outcome.printed)
            assert original.results.setdefault(name, result) == result, name
            assert result, name
        shutil.rmtree(at)


def differences(change: Change, name: str, original: Any, result: Any) -> list[str]:
    """Where a result is not that of the unchanged store and must be."""
    if name == "info":
        differing = sorted(key for key in original.keys() | result.keys() if original.get(key) != result.get(key))
        if any("missing_blocks." in key for key in differing):
            return []  # it says that the store is not whole
        if change.kind == "array":  # other numbers are packed in fewer or more bytes
            return [key for key in differing if not key.startswith(("bits_per_value.", "bytes_per_"))]
        if change.kind != "manifest":
            return differing
        shown = ".".join(["manifest", *map(str, change.path)])
        return [key for key in differing if not f"{key}.".startswith((f"{shown}.", *DERIVED))]
    if change.kind in ("array", "constant", "config") and not change.alike:
        return []
    if name in OTHER_STORES.get(change.field, ()):
        return []
    if isinstance(original, dict):
        return [key for key in original.keys() | result.keys() if original.get(key) != result.get(key)]
    return [] if original == result else [f"{str(original)[:300]} became {str(result)[:300]}"]


def complaints(change: Change, name: str, outcome: Outcome, original: Original, folder: Path) -> Iterator[str]:
    """What is wrong with how a command ended."""
    if outcome.code == 0:
        differing = differences(change, name, original.results[name], result_of(name, folder, outcome.printed))
        if differing:
            yield f"not the same: {', '.join(differing)[:300]}"
        if re.search(r"\bnan\b", outcome.printed, re.IGNORECASE):
            yield f"printed {outcome.printed[:200]!r}"
    elif outcome.code != 1:
        yield "no clear error"
    elif name == "verify" and not outcome.messages:
        # a survey: every finding is a line
        if not re.search("^(DAMAGED|missing|unfinished)", outcome.printed, re.IGNORECASE | re.MULTILINE):
            yield f"names nothing: {outcome.printed[:300]}"
    elif len(outcome.messages) != 1:
        yield f"{len(outcome.messages)} messages: {outcome.messages}"
    if re.search(STEERING, outcome.printed + "".join(outcome.messages)):
        yield f"printed what steers a terminal: {outcome.printed[:200]!r}"
    if outcome.bytes > 2 * original.bytes[name] + NOISE_BYTES:
        yield f"took {outcome.bytes} bytes, not {original.bytes[name]}"


def test_mutations_of_a_store_give_the_same_results_or_one_message(
    originals: list[Original], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, original in enumerate(originals):
        measure(original, tmp_path / f"original-{number}", capsys)
    wrong, codes, fields = list[str](), Counter[int | str](), set[str]()
    for number in range(MUTATIONS):
        draw = random.Random(f"{SEED}-{number}")
        # in every round of kinds of change another store, so that each sees all kinds
        original = originals[(number + number // len(KINDS)) % len(originals)]
        folder = tmp_path / str(number)
        store = Path(shutil.copytree(original.store, folder / "cache.zarr"))
        change = original.places.change(draw, store, number)
        fields.add(change.field)
        run = commands(store, original.student, folder)
        for name in chosen(number):
            outcome = run_one(name, run[name], capsys)
            codes[outcome.code] += 1
            wrong += [
                f"{number} {change}: {name} gave {outcome.code}, {what}"
                for what in complaints(change, name, outcome, original, folder)
            ]
        shutil.rmtree(folder)
    with capsys.disabled():
        print(
            f"\n{MUTATIONS} changed stores, {len(fields)} fields: {codes.total()} commands, {codes[1]} clear errors, "
            f"{codes[0]} results, {codes.total() - codes[0] - codes[1]} tracebacks"
        )
    assert not wrong, "\n".join(wrong)
    assert codes[1] > codes.total() / 3, "most of what is changed cannot be"


def chosen(number: int) -> list[str]:
    """The commands that are given a changed store: of those that take longer one, of few stores only now and then."""
    cheap = ["info", "verify"]
    reading = [READING[number // EVERY % len(READING)]] if number % EVERY == 0 else []
    return [*(cheap[number % 2 :][:1] if FEW else cheap), *reading]
