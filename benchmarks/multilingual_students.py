"""Students of a multilingual encoder that embeds sentences: which shape and method keep its space across languages?

From one store of text in all languages, mixed by size to the power of --mix-alpha, students of copied layers are
trained by each method for the same steps, with the ids alone that the text uses (--all-ids: one with all). On rows that
were held out: the sum of the three relation KLs and the mean hidden NMSE (`kdeval fidelity`). On other pieces of text,
each embedded as the mean of its final states: the mean cosine between student and teacher, and how well the student's
cosines between pieces of two different languages follow the teacher's (Pearson's r over all such pairs).

    python benchmarks/multilingual_students.py --teacher DIR --corpora FOLDER --out students

FOLDER holds `LANGUAGE-*.txt.gz`, a document a line. What is in --out is not computed again. On two idle CPU cores the
default takes half an hour.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import run as run_alone
from record import print_record
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer
from trials import figures, kept
from trim import HELD_OUT, PIECE, documents, run

from cli.kdcache import main as kdcache
from cli.kdeval import main as kdeval
from student_train.evaluate.fidelity.records import FidelityReport
from student_train.run_files import METRICS_NAME, read_records
from student_train.students.vocabulary.kept_ids import KEPT_IDS


def main() -> None:
    options = parse_options()
    options.out.mkdir(parents=True, exist_ok=True)
    languages = sorted(path.name.split("-")[0] for path in options.corpora.glob("*-*.txt.gz"))
    files, pieces = write_texts(options, languages)
    cache, cut = build(options, files), f"trim:{','.join(map(str, files))}"
    teacher = embed(options.teacher, pieces)
    students: dict[str, Any] = {}
    named = ("characters", "mix_alpha", "rows", "steps", "lr")
    chosen = {"teacher": options.teacher.name, **{name: getattr(options, name) for name in named}}
    for shape in options.shapes:
        trainings = [("untrained", "hs"), *((method, method) for method in options.methods)]
        if options.all_ids and shape == options.shapes[0]:
            trainings.append((f"{options.methods[0]}, all ids", options.methods[0]))
        for name, method in trainings:
            steps, ids = 0 if name == "untrained" else options.steps, "all" if name.endswith("all ids") else cut
            compute = partial(train_and_measure, options, cache, shape, method, ids, steps, pieces, teacher)
            settings = {
                "shape": shape,
                "method": method,
                "vocabulary": ids.partition(":")[0],
                "trained": steps,
                **chosen,
            }
            folder = options.out / f"{shape}-{name.replace(', ', '-').replace(' ', '-')}"
            students[f"{shape}, {name}"] = kept(folder, settings, compute, finished=f"{shape}, {name}: done")
            # the same ids, without reading the text once more
            cut = f"trim:{options.out / f'{options.shapes[0]}-untrained' / 'student' / KEPT_IDS}"
    report(students)
    print_record("multilingual_students", languages=languages, **chosen, students=students)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a multilingual encoder as a Hugging Face folder")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of LANGUAGE-*.txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for store, students and results")
    parser.add_argument("--shapes", default="6x384,3x384")
    parser.add_argument("--methods", default="hs,mha,hs+mha")
    parser.add_argument("--characters", type=int, default=200_000, help="of the text in each language")
    parser.add_argument("--mix-alpha", type=float, default=0.3)
    parser.add_argument("--rows", type=int, default=2000, help="rows of 64 tokens of the cache")
    parser.add_argument("--steps", type=int, default=200, help="steps of 16 rows of each student")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--all-ids", action="store_true", help="the first of them once more without cutting the ids")
    options = parser.parse_args()
    options.shapes, options.methods = options.shapes.split(","), options.methods.split(",")
    return options


def write_texts(options: argparse.Namespace, languages: list[str]) -> tuple[list[Path], dict[str, list[str]]]:
    """A file of text in each language, and pieces of what follows it, at even distances."""
    files, held_out = [], {}
    for language in languages:
        pieces = list(documents(options, language))
        count = min(options.characters // PIECE, len(pieces) - HELD_OUT)
        file = options.out / f"{language}.txt"
        file.write_text("".join(f"{piece}\n" for piece in pieces[:count]))
        files.append(file)
        held_out[language] = pieces[count :: (len(pieces) - count) // HELD_OUT][:HELD_OUT]
    return files, held_out


def build(options: argparse.Namespace, files: list[Path]) -> Path:
    cache = options.out / "cache.zarr"
    flags = ["--targets", "hidden,attention", "--seq-len", "64", "--max-rows", str(options.rows)]
    mixed = ["--corpus", *map(str, files), "--mix-alpha", str(options.mix_alpha)]
    run(kdcache, ["build", "--teacher", str(options.teacher), *mixed, *flags, "--out", str(cache)])
    return cache


@torch.inference_mode()
def embed(folder: Path, pieces: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """[S, D] of each language: means of final states, of length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = {}
    for language, texts in pieces.items():
        means = []
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=128, return_tensors="pt").input_ids
            means.append(model(input_ids=ids).last_hidden_state[0].mean(0))
        found[language] = torch.nn.functional.normalize(torch.stack(means)).double().numpy()
    return found


def follow(student: dict[str, np.ndarray], teacher: dict[str, np.ndarray]) -> dict[str, float]:
    """How the student's embeddings follow the teacher's: as they are, and in their cosines across languages."""
    cosines = [(student[language] * teacher[language]).sum(axis=1) for language in teacher]
    across = [
        np.concatenate([(one[a] @ one[b].T).ravel() for a, b in combinations(teacher, 2)]) for one in (student, teacher)
    ]
    return {"cosine": float(np.concatenate(cosines).mean()), "across": float(np.corrcoef(*across)[0, 1])}


def train_and_measure(
    options: argparse.Namespace,
    cache: Path,
    shape: str,
    method: str,
    vocabulary: str,
    steps: int,
    pieces: dict[str, list[str]],
    teacher: dict[str, np.ndarray],
    folder: Path,
) -> dict[str, Any]:
    out = folder / "student"
    sizes = ["--steps", str(steps), "--batch-size", "16", "--lr", str(options.lr), "--save-every", "100000"]
    told = ["--student", shape, "--method", method, "--vocabulary", vocabulary, "--valid-every", str(max(1, steps))]
    began = time.perf_counter()
    # a process of its own, whose memory is that of this training
    run_alone("kdtrain", "--cache", str(cache), "--out", str(out), *told, *sizes)
    seconds = time.perf_counter() - began
    run(kdeval, ["fidelity", "--student", str(out), "--cache", str(cache), "--json"])
    fidelity = FidelityReport.from_json(json.loads((out / "fidelity.json").read_text()))
    made = [line for line in read_records(out / METRICS_NAME) if "loss" in line] if steps else []
    distances = figures(fidelity)
    found = {
        "seconds": seconds,
        "step_seconds": statistics.median(line["seconds"] for line in made) if made else None,
        "memory": max((line["memory"] for line in made), default=None),
        "ids": json.loads((out / "config.json").read_text())["vocab_size"],
        "bytes": (out / "model.safetensors").stat().st_size,
        "relation_kl": distances.get("mha"),
        "hidden_nmse": distances.get("hs"),
        **follow(embed(out, pieces), teacher),
    }
    # not needed any more
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return found


def report(students: dict[str, Any]) -> None:
    table = Table(title="on held-out rows, and pieces of other text")
    for name in ("", "ids", "MB", "s a step", "memory, MB", "relation KL", "hidden NMSE", "cosine", "r across"):
        table.add_column(name, justify="right" if name else "left")
    for name, one in students.items():
        table.add_row(
            name,
            f"{one['ids']:,}",
            f"{one['bytes'] / 1e6:.0f}",
            "" if one["step_seconds"] is None else f"{one['step_seconds']:.2f}",
            "" if one["memory"] is None else f"{one['memory'] / 1e6:,.0f}",
            "" if one["relation_kl"] is None else f"{one['relation_kl']:.3f}",
            "" if one["hidden_nmse"] is None else f"{one['hidden_nmse']:.3f}",
            f"{one['cosine']:.3f}",
            f"{one['across']:.3f}",
        )
    Console(file=sys.stderr, width=120).print(table)


if __name__ == "__main__":
    main()
