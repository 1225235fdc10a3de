"""What a smaller vocabulary buys: a multilingual encoder cut to two and to nine languages, and students trained so.

For each set of languages the model in --teacher is trimmed by `kdeval trim` to what a text in them uses, and compared
with itself on other text in the same languages: parameters, bytes, time to load, time of a forward pass, and the
cosine between the mean final states of both. Then a cache of the set is built, and a student of half the layers is
trained from it by `hs`, with all ids and with those of the text: seconds a step, bytes of a checkpoint, hidden NMSE on
rows that were held out.

    python benchmarks/trim.py --teacher DIR --corpora FOLDER

FOLDER holds `LANGUAGE-*.txt.gz`, a document a line. With the defaults two busy CPU cores take half an hour, most of it
the updates of 96 million embeddings.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from record import print_record
from rich.console import Console
from rich.table import Table
from transformers import AutoModel, AutoTokenizer

from cli.kdcache import main as kdcache
from cli.kdeval import main as kdeval
from cli.kdtrain import main as kdtrain

PIECE = 400
"""Characters of a document, cut from longer ones."""
HELD_OUT = 16
"""Documents of each language that are compared, its first; the text is made of those that follow."""


def main() -> None:
    options = parse_options()
    languages = sorted(path.name.split("-")[0] for path in options.corpora.glob("*-*.txt.gz"))
    sets = {"de+en": ["de", "en"], f"all {len(languages)}": languages}
    found = {}
    with tempfile.TemporaryDirectory(prefix="trim-") as scratch:
        for name, chosen in sets.items():
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            found[name] = measure(options, folder, chosen)
    report(found)
    print_record(
        "trim",
        teacher=options.teacher.name,
        characters=options.characters,
        rows=options.rows,
        steps=options.steps,
        sets=found,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="a multilingual encoder as a Hugging Face folder")
    parser.add_argument("--corpora", type=Path, required=True, help="folder of LANGUAGE-*.txt.gz")
    parser.add_argument("--characters", type=int, default=200_000, help="of the text in each language")
    parser.add_argument("--rows", type=int, default=160, help="rows of 64 tokens of each cache")
    parser.add_argument("--steps", type=int, default=15, help="steps of 8 rows of each student; 0 trains none")
    parser.add_argument("--passes", type=int, default=9, help="forward passes of each model that are timed")
    return parser.parse_args()


def documents(options: argparse.Namespace, language: str) -> Iterator[str]:
    """Pieces of the documents in a language, in order; the first line of a file says where its text is from."""
    (path,) = options.corpora.glob(f"{language}-*.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in islice(lines, 1, None):
            text = line.strip()
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def measure(options: argparse.Namespace, folder: Path, languages: Sequence[str]) -> dict[str, Any]:
    """Everything about one set of languages."""
    text, held_out, count = folder / "text.txt", dict[str, list[str]](), options.characters // PIECE
    with text.open("w", encoding="utf-8") as file:
        for language in languages:
            pieces = documents(options, language)
            held_out[language] = list(islice(pieces, HELD_OUT))
            file.writelines(f"{piece}\n" for piece in islice(pieces, count))
    trimmed = folder / "trimmed"
    command = ["trim", "--student", str(options.teacher), "--out", str(trimmed), "--text", str(text), "--json"]
    record = json.loads(run(kdeval, command))
    kept = ("tokens", "used", "before", "after", "pieces")
    found = {"languages": list(languages), **{key: record[key] for key in kept}}
    folders = options.teacher, trimmed
    found["load_seconds"] = [statistics.median(load_seconds(each) for _ in range(3)) for each in folders]
    models = [AutoModel.from_pretrained(each, add_pooling_layer=False).eval() for each in folders]
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in folders]
    found["forward_ms"] = forward_ms(models, options.passes)
    found["held_out"] = {language: compare(models, tokenizers, texts) for language, texts in held_out.items()}
    del models
    if options.steps:
        found["students"] = train_both(options, folder, text)
    return found


def load_seconds(folder: Path) -> float:
    started = time.perf_counter()
    AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return time.perf_counter() - started


def forward_ms(models: Sequence[Any], passes: int) -> list[float]:
    """Medians of a pass over 32 tokens, one model after the other in each round."""
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for _ in range(passes + 1):
            for model, taken in zip(models, seconds, strict=True):
                ids = torch.randint(5, model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
                started = time.perf_counter()
                model(input_ids=ids)
                taken.append(time.perf_counter() - started)
    return [1e3 * statistics.median(taken[1:]) for taken in seconds]


@torch.inference_mode()
def compare(models: Sequence[Any], tokenizers: Sequence[Any], texts: Sequence[str]) -> dict[str, float]:
    """Cosines between the mean final states of texts by both models, each reading them in its own pieces."""
    cosines, same, unknown, tokens = [], 0, 0, 0
    for text in texts:
        pieces = [tokenizer(text, truncation=True, max_length=128) for tokenizer in tokenizers]
        means = [
            model(input_ids=torch.tensor([each.input_ids])).last_hidden_state[0].mean(0)
            for model, each in zip(models, pieces, strict=True)
        ]
        cosines.append(float(torch.cosine_similarity(*means, dim=0)))
        names = [each.convert_ids_to_tokens(ids.input_ids) for each, ids in zip(tokenizers, pieces, strict=True)]
        same += names[0] == names[1]
        unknown += names[1].count(tokenizers[1].unk_token) - names[0].count(tokenizers[0].unk_token)
        tokens += len(names[0])
    return {
        "cosine": statistics.mean(cosines),
        "least_cosine": min(cosines),
        "same_pieces": same / len(texts),
        "unknown": unknown / tokens,
    }


def train_both(options: argparse.Namespace, folder: Path, text: Path) -> dict[str, Any]:
    """Students of all ids and of the text's, from the same cache, with the same batches."""
    cache = folder / "cache.zarr"
    flags = ["--targets", "hidden", "--seq-len", "64", "--max-rows", str(options.rows), "--out", str(cache)]
    run(kdcache, ["build", "--teacher", str(options.teacher), "--corpus", str(text), *flags])
    found = {}
    for name, vocabulary in (("all", "all"), ("text", f"trim:{text}")):
        out = folder / name
        sizes = ["--steps", str(options.steps), "--batch-size", "8", "--valid-share", "0.1", "--save-every", "1000"]
        command = ["--cache", str(cache), "--method", "hs", "--vocabulary", vocabulary, "--out", str(out), *sizes]
        run(kdtrain, command)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        (checkpoint,) = (out / "checkpoints").iterdir()
        run(kdeval, ["fidelity", "--student", str(out), "--cache", str(cache), "--json"])
        hidden = json.loads((out / "fidelity.json").read_text())["hidden"]
        found[name] = {
            "ids": json.loads((out / "config.json").read_text())["vocab_size"],
            "step_seconds": statistics.median(step["seconds"] for step in lines if "loss" in step),
            "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
            "valid_loss": [line["valid_loss"] for line in lines if "valid_loss" in line],
            "hidden_nmse": statistics.mean(pair["nmse"] for pair in hidden),
        }
    return found


def run(command: Callable[[list[str]], int], arguments: list[str]) -> str:
    """What a command prints.

    Raises:
        SystemExit: it fails.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = command(arguments)
    if code:
        raise SystemExit(code)
    return printed.getvalue()


def report(found: dict[str, Any]) -> None:
    table = Table(title="before and after")
    columns = ("languages", "ids", "parameters", "MB", "load, s", "forward, ms", "cosine", "same pieces", "unknown")
    for column in columns:
        table.add_column(column, justify="right" if column != "languages" else "left")
    for name, one in found.items():
        pair = one["before"], one["after"]
        held_out = one["held_out"].values()
        table.add_row(
            name,
            " -> ".join(f"{each['ids']:,}" for each in pair),
            " -> ".join(f"{each['parameters'] / 1e6:.1f}M" for each in pair),
            " -> ".join(f"{each['bytes'] / 1e6:.0f}" for each in pair),
            " -> ".join(f"{each:.2f}" for each in one["load_seconds"]),
            " -> ".join(f"{each:.1f}" for each in one["forward_ms"]),
            f"{statistics.mean(each['cosine'] for each in held_out):.5f}",
            f"{statistics.mean(each['same_pieces'] for each in held_out):.1%}",
            f"{statistics.mean(each['unknown'] for each in held_out):.3%}",
        )
    Console(width=150, stderr=True).print(table)


if __name__ == "__main__":
    main()
