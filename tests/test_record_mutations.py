"""Records changed at one place at random: one message, or the results of the unchanged record; never a traceback.

What lies beside a model has no hash chain: the records of its training and of its measurements, the marker of its
checkpoint, the file of a sweep (`tests/record_mutations.py`). The commands that read them run in this process. Each
must end in time with one message, or give what it gives of the unchanged files. What may differ:

- A record in which a value is of the same kind as before is one that somebody could have measured, so what is shown of
  it may be other. Only that file's part of a result may be, and every number there is finite.
- Another name or path in provenance, and what the student learned from, may be another training: what is measured then
  is said to be so. Of a marker nothing may be another: its checkpoint goes on exactly, or not at all.
- A sweep gives exactly the trainings that a plain reading of its file gives.
- A comparison names a run that it cannot read and leaves it out; of the others it says what it said.

A quarter of KDCACHE_MUTATIONS, the number for stores, says how many changes are tried, KDCACHE_SEED which.
"""

from __future__ import annotations

import hashlib
import json
import math
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

from cli import kdeval, kdtrain
from student_train.evaluate.load import weights_fingerprint
from teacher_cache.build.build import build_cache
from teacher_cache.build.settings import BuildSettings
from tests.outcomes import STEERING, Outcome, leaves, run_one
from tests.record_mutations import MARKER, METRICS, SWEEP, TWICE, Change, Places, numbers, plain_sweep
from tests.records import without_times
from tests.student_train.evaluate.left_records import answered, finetuned, harnessed, read_text, timed

MANY = int(os.environ.get("KDCACHE_MUTATIONS", "0")) // 4
MUTATIONS = MANY or 30
EVERY = 1 if MANY else 3
"""Of so many changes one is given to the commands that take longer."""
SEED = int(os.environ.get("KDCACHE_SEED", "0"))
SECTIONS: Mapping[str, set[str]] = {
    "fidelity": {"", "fidelity", "reproduce"},
    "finetune-sst2": {"", "tasks", "reproduce"},
    "latency": {"", "latency", "reproduce"},
    "perplexity": {"", "perplexity", "reproduce"},
    "lm-eval": {"", "harness", "reproduce"},
    METRICS: {"", "training"},
    "provenance": {"", "fidelity", "relations", "perplexity", "latency", "provenance", "reproduce"},
}
"""Where a report shows each record; "" is its head."""
OWN = ("fidelity", "scores_by_run", "perplexity", "bits_per_byte", "lm_eval", "parameters", "method")
"""What a comparison says of a run whatever the others are."""


@dataclass(frozen=True, kw_only=True)
class Original:
    """A folder with a run, another that stays as it is, and a sweep; and what each command gives of it."""

    folder: Path
    store: Path
    places: Places
    results: dict[str, Any] = field(default_factory=dict)


def training(store: Path, out: Path, *more: str) -> list[str]:
    return [
        "--cache", str(store), "--method", "mha+hs", "--weights", "1,0.1", "--steps", "2", "--batch-size", "4",
        "--device", "cpu", "--valid-share", "0.2", "--warmup", "1", "--mapping", "1:2,2:4", "--save-every", "1",
        "--out", str(out), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def original(
    tiny_teacher: Callable[..., Path], tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Original:
    folder, store = tmp_path_factory.mktemp("records"), tmp_path_factory.mktemp("store") / "cache.zarr"
    sizes: dict[str, Any] = {"seq_len": 24, "max_rows": 24, "block_rows": 8, "attention_layer": 3, "device": "cpu"}
    build_cache(
        BuildSettings(
            teacher=str(tiny_teacher()), corpus=(str(tiny_corpus),), out=str(store), layers="2,4",
            targets="hidden,attention", precision="float16", **sizes,
        )
    )  # fmt: skip
    run, other = folder / "run", folder / "other"
    assert kdtrain.main(training(store, run)) == 0
    assert kdeval.main(["fidelity", "--student", str(run), "--cache", str(store)]) == 0
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((other / "provenance.json").read_text())
    record["settings"]["seed"] = 1
    (other / "provenance.json").write_text(json.dumps(record))
    prints = {"student": weights_fingerprint(run), "teacher": "t", "text": "text", "vocabulary": "v"}
    for each, score in ((run, 0.7), (other, 0.6)):
        finetuned(
            each, "sst2", [score, score + 0.02, score + 0.01], fingerprints={"weights": prints["student"]},
            by_test={"de": {"scores": [score] * 3}}, learning_rates=[0.1, 0.1, 0.2], command="kdeval finetune",
        )  # fmt: skip
        finetuned(each, "rte", [score])
        answered(each, 400.0)
        generation = json.loads((each / "latency.json").read_text())["generation"]
        timed(each, 3.0, generation=generation, fingerprints=prints, command="kdeval latency")
        read_text(each, 8 * score, fingerprints=prints)
        harnessed(each, {"animals": score, "tools": 0.5})
    (folder / "sweep.yaml").write_text(
        f"cache: {store}\nout: students\nsteps: 2\nbatch_size: 4\nlauncher: torchrun --nproc-per-node 2\n"
        "runs:\n  a: {method: mha}\n  b: {method: hs, mapping: '1:2,2:4'}\ngrid:\n  seed: [0, 1]\n  lr: [0.001, 0.01]\n"
    )
    (folder / "again.yaml").write_text("grid: {seed: [0]}\n")
    return Original(folder=folder, store=store, places=Places(folder, SEED))


def commands(original: Original, folder: Path) -> dict[str, Callable[[], int]]:
    run, other, cache = str(folder / "run"), str(folder / "other"), str(original.store)
    resumed = training(original.store, folder / "run", "--resume", "auto")
    checkpoint = str(max((folder / "run" / "checkpoints").glob("step-*")))
    return {
        "compare": lambda: kdeval.main(["compare", run, other, "--json"]),
        "table": lambda: kdeval.main(["compare", run, other, "--out", str(folder / "comparison")]),
        "report": lambda: kdeval.main(["report", run, "--out", str(folder / "report.html")]),
        "fidelity": lambda: kdeval.main(["fidelity", "--student", run, "--cache", cache, "--json"]),
        "checkpoint": lambda: kdtrain.main([*resumed[:-1], checkpoint, "--dry-run", "--json"]),
        "resume": lambda: kdtrain.main(resumed),
        "sweep": lambda: kdtrain.main(["--config", str(folder / "sweep.yaml"), "--dry-run", "--json"]),
    }


READ_BY: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    MARKER: (("checkpoint",), ("resume",)),
    SWEEP: (("sweep",), ()),
    METRICS: (("report",), ("resume",)),
    "provenance": (("compare",), ("report", "table", "fidelity")),
}
"""By kind, the commands that read it; those of the second take longer, and fidelity leaves another record. All others
are read by compare, then report."""


def chosen(change: Change, number: int) -> list[str]:
    cheap, longer = READ_BY.get(change.kind, (("compare",), ("report", "table")))
    if MANY:
        return [*cheap, *longer]
    return [*cheap, *(longer if number % EVERY == 0 else ())]


def result_of(name: str, folder: Path, printed: str) -> Any:
    """What a command has given, without paths and times."""
    printed = printed.replace(str(folder), "")
    if name == "compare":
        found = json.loads(printed)
        rows = {Path(row["runs"][0]).name: row for row in found["rows"]}
        return {"rows": rows, "tasks": found["tasks"], "notes": found["notes"]}
    if name == "table":
        return (folder / "comparison" / "comparison.md").read_text().replace(str(folder), "")
    if name == "report":
        head, *rest = re.split(r'<section id="(\w+)">', (folder / "report.html").read_text().replace(str(folder), ""))
        return {"": head, **dict(zip(rest[::2], rest[1::2], strict=True))}
    if name == "fidelity":
        found = json.loads(printed)
        keys = ("relations", "hidden", "distribution", "first_row", "last_row", "tokens", "held_out", "notes")
        return {key: found[key] for key in keys}
    if name == "checkpoint":
        return {key: value for key, value in json.loads(printed).items() if key in ("steps", "parameters")}
    if name == "resume":
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        weights = (folder / "run" / "model.safetensors").read_bytes()
        return {"records": without_times(records), "weights": hashlib.sha256(weights).hexdigest()}
    return [(name.rpartition("/")[2], flags) for name, flags in listed(printed)]


def listed(printed: str) -> list[tuple[str, list[str]]]:
    """The trainings of a sweep: the folder of each, and its other flags, sorted."""
    found = []
    for one in json.loads(printed)["runs"]:
        *flags, flag, out = one["flags"]
        assert flag == "--out" and out.endswith(one["name"])
        found.append((out.removesuffix(one["name"]).removesuffix("/"), sorted(flags)))
    return found


def copied(original: Original, folder: Path) -> Path:
    return Path(shutil.copytree(original.folder, folder))


def differences(change: Change, name: str, before: Any, after: Any) -> list[str]:
    """Where a result is not that of the unchanged records and must be."""
    if before == after:
        return []
    if name == "compare":
        theirs = [row["other"] for row in (before["rows"], after["rows"]) if "other" in row]
        if len(theirs) == 2 and any(theirs[0][key] != theirs[1][key] for key in OWN):
            return ["what is said of the run that was not changed"]
    if name == "resume" and change.kind == METRICS and change.possible:
        return [] if before["weights"] == after["weights"] else ["weights"]
    if name == "fidelity":
        told = any("no record of kdtrain" in note or "other contents" in note for note in after["notes"])
        return [] if told or (change.possible and change.field.startswith("provenance.objective")) else ["measures"]
    if change.kind == MARKER or not change.possible:
        if isinstance(before, str):
            return [repr(line) for line in after.splitlines() if line not in before.splitlines()] or ["lines"]
        different = dict(leaves(before)), dict(leaves(after))
        return [key for key in different[0] | different[1] if different[0].get(key) != different[1].get(key)] or ["all"]
    if name == "report":
        return [key for key in before | after if before.get(key) != after.get(key) and key not in SECTIONS[change.kind]]
    return []


def complaints(change: Change, name: str, outcome: Outcome, original: Original, folder: Path) -> Iterator[str]:
    """What is wrong with how a command ended."""
    usage = outcome.code == "exit 2" and change.kind == SWEEP
    if outcome.code == 0:
        yield from wrong_results(change, name, outcome, original, folder)
    elif outcome.code != 1 and not usage:
        yield "no clear error"
    elif change.alike:
        yield "refused, though nothing was changed"
    elif len(outcome.messages) != 1 and not (usage and outcome.messages):
        yield f"{len(outcome.messages)} messages: {outcome.messages}"
    if re.search(STEERING, outcome.printed + "".join(outcome.messages)):
        yield f"printed what steers a terminal: {outcome.printed[:200]!r}"
    # flags are told as they were written
    if change.kind != SWEEP and any(len(message) > 3000 for message in outcome.messages):
        yield f"a message of {max(map(len, outcome.messages))} letters"


def left_out(name: str, result: Any) -> list[str]:
    """What a comparison says of runs that it cannot read: those are named, and the others compared."""
    notes = result["notes"] if name == "compare" else result.splitlines() if name == "table" else []
    return [note for note in notes if note.removeprefix("- ").startswith("left out: ")]


def wrongly_left_out(change: Change, name: str, notes: list[str], result: Any, original: Original) -> Iterator[str]:
    """What is wrong with a comparison that leaves out the run whose record was changed."""
    if change.alike or len(notes) > 1:
        yield f"left out: {notes}"
    if name != "compare":
        return
    if result["rows"].keys() != {"other"}:
        yield f"compared {sorted(result['rows'])} and left out the changed one"
    before = original.results["alone"]["rows"]["other"]
    yield from (f"{key} of the run that was not changed" for key in OWN if before[key] != result["rows"]["other"][key])


def wrong_results(change: Change, name: str, outcome: Outcome, original: Original, folder: Path) -> Iterator[str]:
    """What is wrong with what a command gave."""
    if name in ("compare", "table") and (notes := left_out(name, result_of(name, folder, outcome.printed))):
        yield from wrongly_left_out(change, name, notes, result_of(name, folder, outcome.printed), original)
        return
    if change.how.startswith(TWICE) and name != "resume":  # which goes on from the checkpoint before
        yield "taken, though a name is given twice"
    if name == "sweep":
        asked, found = plain_sweep((folder / "sweep.yaml").read_text()), listed(outcome.printed)
        if found != asked:
            yield f"not what the file asks for: {found} instead of {asked}"[:500]
        return
    if re.search(r"\b(nan|inf)\b", outcome.printed):
        yield f"printed {outcome.printed[:200]!r}"
    result = result_of(name, folder, outcome.printed)
    if name not in ("table", "report") and not all(math.isfinite(number) for number in numbers(result)):
        yield "a number that is none"
    differing = differences(change, name, original.results[name], result)
    if differing:
        yield f"not the same: {', '.join(differing)[:300]}"


def test_mutations_of_records_give_the_same_results_or_one_message(
    original: Original, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in commands(original, copied(original, tmp_path / "original")):
        folder = copied(original, tmp_path / f"original-{name}")
        outcome = run_one(name, commands(original, folder)[name], capsys)
        assert outcome.code == 0, f"{name}: {outcome}"
        original.results[name] = result_of(name, folder, outcome.printed)
        assert original.results[name], name
    alone = run_one("compare", lambda: kdeval.main(["compare", str(original.folder / "other"), "--json"]), capsys)
    original.results["alone"] = result_of("compare", original.folder, alone.printed)
    wrong, codes, fields = list[str](), Counter[int | str](), set[str]()
    for number in range(MUTATIONS):
        folder = copied(original, tmp_path / str(number))
        change = original.places.change(random.Random(f"{SEED}-{number}"), folder, number)
        fields.add(change.field)
        for name in chosen(change, number):
            outcome = run_one(name, commands(original, folder)[name], capsys)
            told = outcome.code in (1, "exit 2") or (
                outcome.code == 0
                and name in ("compare", "table")
                and left_out(name, result_of(name, folder, outcome.printed))
            )
            codes["clear" if told else outcome.code] += 1
            wrong += [
                f"{number} {change}: {name} gave {outcome.code}, {what}"
                for what in complaints(change, name, outcome, original, folder)
            ]
        shutil.rmtree(folder)
    with capsys.disabled():
        print(
            f"\n{MUTATIONS} changed records, {len(fields)} fields: {codes.total()} commands, {codes['clear']} clear "
            f"errors, {codes[0]} results, {codes.total() - codes[0] - codes['clear']} tracebacks"
        )
    assert not wrong, "\n".join(wrong)
    assert codes["clear"] > codes.total() / 4, "most of what is changed cannot be"
