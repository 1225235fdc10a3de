"""Does this code still write the same stores and train the same students, bit for bit, as it did before a change?

    python benchmarks/reproduce.py > before.txt
    python benchmarks/reproduce.py --against before.txt   # after a change that must not change any result

What flows: tiny random teachers (BERT and ModernBERT, 4 layers of 32) and synthetic text, both from seeds -> `kdcache
build` and `derive`, stores of every target, form and codec -> `kdtrain`, 20 steps of every method and way to start a
student -> `kdeval fidelity` of some of them. A line each:

    store NAME     number of objects, SHA-256 over their names and contents
    train NAME     losses of steps 1, 10 and 20, validation loss, SHA-256 of all records and of the student's weights
    measure NAME   SHA-256 of the record

and at the end `reproduce:` with the SHA-256 of these lines. `--against` prints the lines that differ from those of an
earlier output, and exits with 1 if there are any. Lines that begin with # name what the figures depend on besides this
code; they are not compared. `--out` keeps stores, students and, in `listings/`, the hash of each object by name: `diff`
of two of these names the objects behind a line.

Nothing of the project is imported but its commands, which run in this process one after the other, on the CPU in
float32 with one thread: whatever lies below them may be moved. Needs neither a network nor data. Costs half a minute on
one core and 60 MB in `--out`, a temporary folder unless given.

Equal lines are to be expected only on the same kind of machine with the same versions: others sum in another order. Not
covered: what changes from run to run by its nature (`comparable`, TIMINGS, PROVENANCE), resuming, sweeps, fine-tuning,
latency, several processes, GPUs, object storage.
"""

from __future__ import annotations

import os

# before anything imports NumPy, PyTorch and what they bring along, which read these once
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error"}

import argparse
import contextlib
import difflib
import gzip
import hashlib
import io
import json
import logging
import platform
import random
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from cli import kdcache, kdeval, kdtrain

BUILD = "--seq-len 24 --max-rows 90 --block-rows 32 --batch-size 8 --k 8 --seed 3 --device cpu --dtype float32"
BERT = "build --teacher teachers/bert --corpus text.txt"
MODERN = "build --teacher teachers/modernbert --corpus text.txt"
MIXED = "build --teacher teachers/bert --corpus text.txt@1 other.jsonl.gz@2"
EVERY = "--layers all --attention-layer 3 --views 2"
STORES = {
    "float16": f"{BERT} {EVERY} --precision float16",
    "int8": f"{BERT} {EVERY} --precision int8",
    "int4": f"{BERT} {EVERY} --precision int4",
    "nmse-2": f"{BERT} {EVERY} --precision nmse:1e-2",
    "nmse-1": f"{BERT} {EVERY} --precision nmse:1e-1",
    "masked": f"{BERT} {EVERY} --precision nmse:1e-2 --hs-view masked --rows document",
    "headless": "build --teacher teachers/headless --corpus text.txt",
    "logits": f"{BERT} --targets logits --temperature 2 --rows document",
    "sample": f"{BERT} --targets logits --logits sample --views 2",
    "hidden": f"{BERT} --targets hidden --layers uniform:2+last --precision nmse:1e-1",
    "input": f"{BERT} --targets attention --precision int8",
    "projected": f"{BERT} --targets attention --precision nmse:1e-2",
    "qkv": f"{BERT} --targets attention --relations qkv --precision nmse:1e-2",
    "qkv-masked": f"{BERT} --targets attention --relations qkv --precision int4 --hs-view masked --views 2",
    "matrix": f"{BERT} --targets attention --relations matrix --relation-heads 4",
    "modernbert": f"{MODERN} {EVERY} --precision float16",
    "modernbert-nmse": f"{MODERN} --targets attention,hidden --precision nmse:1e-1",
    "mixed": "build --teacher teachers/bert --corpus text.txt other.jsonl.gz --mix-alpha 0.3 --precision int4",
    "part-1": f"{MIXED} --part 1/2 --precision float16",
    "part-2": f"{MIXED} --part 2/2 --precision float16",
    "extended": f"{BERT} --targets hidden --layers 4 --precision float16",
    "extended+layers": f"{BERT} --targets hidden,attention --layers 1,3 --precision nmse:1e-2 --attention-layer 2",
    "extended+targets": f"{BERT} --targets attention,logits --attention-layer 4 --relations qkv",
    "derived": "derive stores/nmse-2 --layers 2,4 --k 4 --precision nmse:1e-1 --row-range 5:77",
    "derived-codes": "derive stores/float16 --targets hidden,attention --precision int8 --max-rows 50",
}
"""What is built, in this order; NAME+MORE adds to the finished store NAME."""

TRAIN = "--steps 20 --batch-size 8 --valid-share 0.2 --valid-every 10 --seed 4 --device cpu --dtype float32"
TRAININGS = {
    "mha": "float16 --method mha",
    "mha-qkv": "qkv --method mha",
    "mha-matrix": "matrix --method mha --relation-heads 4",
    "mha-masked": "qkv-masked --method mha --relation-weights 1,0,2",
    "mha-projected": "projected --method mha --init random",
    "mha-pairs": "extended --method mha --attention-layer 1:2,2:4",
    "mha-parts": "part-1,part-2 --method mha --student 3x32",
    "mha-modernbert": "modernbert --method mha",
    "mha-sliced": "int4 --method mha --student 2x16:2:40",
    "direct": "int8 --method direct",
    "direct-random": "nmse-2 --method direct --init random",
    "hs": "float16 --method hs",
    "hs-coordinates": "nmse-2 --method hs --init random",
    "hs-last1": "nmse-1 --method hs --mapping last1",
    "hs-uniform-cons": "int8 --method hs --mapping uniform-cons",
    "hs-pairs": "extended --method hs --mapping 1:1,2:4",
    "hs-skip": "float16 --method hs --mapping skip",
    "hs-emd": "float16 --method hs --mapping emd",
    "hs-alp": "float16 --method hs --mapping alp",
    "hs-sliced": "nmse-2 --method hs --student 2x24:3:48 --micro-batch-size 4",
    "hs-last": "masked --method hs --mapping last --init teacher:last --activation-checkpointing",
    "hs-headless": "headless --method hs --student 2x16",
    "hs-modernbert": "modernbert-nmse --method hs --student 2x16",
    "od": "logits --method od --dropout 0.1",
    "od-renormalise": "float16 --method od --topk-loss renormalise",
    "od-sample": "sample --method od --init embeddings",
    "od-sliced": "sample --method od --student 2x16",
    "od-modernbert": "modernbert --method od",
    "mlm": "float16 --method mlm --init random",
    "od+mlm": "mixed --method od+mlm",
    "mha+hs": "derived-codes --method mha+hs --weights 1,0.1",
    "mha+hs+od": "derived --method mha+hs+od --mapping uniform --weights 1,0.1,2",
}
"""Students: the stores that they learn from, and flags."""

MEASURES = {"mha": "float16", "hs-sliced": "float16", "od-modernbert": "modernbert", "mha-matrix": "matrix"}
"""Students, and the store on whose held-out rows they are measured."""

SYLLABLES = "ba de fi go hu ka le mi no pu ra se ti vo".split()
SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
LOSSES = (1, 10, 20)
"""Steps whose losses are printed."""
TIMINGS = ("seconds", "wait", "memory")
"""Entries of a training's records that are of the run, not of what it computed."""
PROVENANCE = ("software", "git_revision", "command", "created")
"""Entries of manifests and records that say when and by what they were made."""
MANIFEST = re.compile(r"(extensions/\d+/)?zarr\.json")
SEAL = re.compile(r"(extensions/\d+/)?seal\.json")


def main() -> int:
    options = parse_options()
    earlier = None if options.against is None else Path(options.against).read_text(encoding="utf-8").splitlines()
    print(f"the code is that of {str(Path(kdcache.__file__).parents[1])!r}", file=sys.stderr)
    lines = []
    with contextlib.ExitStack() as stack:
        out = Path(options.out or stack.enter_context(tempfile.TemporaryDirectory()))
        out.mkdir(parents=True, exist_ok=True)
        # stores name teachers and texts as they were given: relative names are the same wherever all this lies
        stack.enter_context(contextlib.chdir(out))
        for line in results():
            print(line, flush=True)
            lines.append(line)
    text = "".join(f"{line}\n" for line in compared(lines))
    lines.append(f"reproduce: {sha256(text.encode())}")
    print(lines[-1])
    return 0 if earlier is None else compare(earlier, lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="new or empty folder, in which everything is kept")
    parser.add_argument("--against", help="earlier output of this script to compare with")
    options = parser.parse_args()
    if options.out is not None and Path(options.out).exists() and any(Path(options.out).iterdir()):
        raise SystemExit(f"--out {options.out!r} holds something: commands would go on from it; give an empty folder")
    return options


def compared(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


def compare(earlier: list[str], lines: list[str]) -> int:
    """Print the lines that differ; returns the exit code."""
    if compared(earlier) == compared(lines):
        print("nothing differs", file=sys.stderr)
        return 0
    print("\n".join(difflib.unified_diff(earlier, lines, "before", "now", n=0, lineterm="")), file=sys.stderr)
    return 1


def results() -> Iterator[str]:
    """The lines but the last one, of what is made meanwhile in the working directory."""
    make_texts()
    make_teachers()
    yield describe_surroundings()
    for name, text in STORES.items():
        store = Path("stores", name.partition("+")[0])
        command, *flags = text.split()
        place = [str(store)] if command == "derive" else ["--out", str(store), *BUILD.split()]
        run(kdcache.main, command, *flags, *place)
        yield f"store {name:<16} {describe_store(store, Path('listings', f'{name}.txt'))}"
    for name, text in TRAININGS.items():
        caches, *flags = text.split()
        student = Path("students", name)
        stores = [f"stores/{cache}" for cache in caches.split(",")]
        run(kdtrain.main, "--cache", *stores, "--out", str(student), *flags, *TRAIN.split())
        yield f"train {name:<16} {describe_training(student)}"
    for name, store in MEASURES.items():
        flags = ["--student", f"students/{name}", "--cache", f"stores/{store}", "--device", "cpu", "--json"]
        record = json.loads(run(kdeval.main, "fidelity", *flags))
        yield f"measure {name:<14} {sha256_of_json(without(record, *PROVENANCE))}"


def run(main: Callable[[list[str]], int], *arguments: str) -> str:
    """Run one of our commands in this process, what it says withheld unless it fails; returns its standard output."""
    said, result = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(result):
            code = main(list(arguments))
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        logging.getLogger().handlers.clear()  # they write to what is this command's standard error alone
    if code:
        name = main.__module__.rpartition(".")[2]
        raise SystemExit(f"{said.getvalue()}{shlex.join([name, *arguments])} ended with {code}")
    return result.getvalue()


# ---- what is built from ----


def make_texts() -> None:
    """Two files of short documents whose words depend on the words before them: something that can be learnt."""
    draw = random.Random(20240229)
    documents = []
    for _ in range(300):
        word, words = draw.randrange(len(WORDS)), []
        for _ in range(draw.randint(4, 60)):
            words.append(WORDS[word])
            word = (word * 7 + draw.choice((1, 1, 2, 5, draw.randrange(len(WORDS))))) % len(WORDS)
        documents.append(" ".join(words))
    Path("text.txt").write_text("\n".join(documents[:200]) + "\n", encoding="utf-8")
    with gzip.open("other.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents[200:])


def make_teachers() -> None:
    """Complete Hugging Face folders with random weights, large enough that neighbouring tokens differ clearly."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    ids = {token: index for index, token in enumerate((*SPECIAL.values(), *WORDS))}
    words = Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk"]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.BertProcessing(*((SPECIAL[name], ids[SPECIAL[name]]) for name in ("sep", "cls")))
    names = {f"{name}_token": token for name, token in SPECIAL.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    settings = {"vocab_size": len(ids), "max_position_embeddings": 64, "initializer_range": 0.2, **sizes}
    settings |= {f"{name}_token_id": ids[SPECIAL[name]] for name in ("pad", "cls", "sep")}
    modern = {"local_attention": 16, "global_attn_every_n_layers": 3, "bos_token_id": None, "eos_token_id": None}
    for name, family, model_class, further in (
        ("bert", "bert", AutoModelForMaskedLM, {}),
        ("headless", "bert", AutoModel, {}),
        ("modernbert", "modernbert", AutoModelForMaskedLM, modern),
    ):
        torch.manual_seed(0)
        model = model_class.from_config(AutoConfig.for_model(family, **settings, **further))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases of zero and norms of one would hide a forgotten one
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(f"teachers/{name}")
        tokenizer.save_pretrained(f"teachers/{name}")


# ---- what came out ----


def describe_store(store: Path, listing: Path) -> str:
    """How many objects it has, and the hash of the list of their hashes, which is written to `listing`."""
    paths = {path.relative_to(store).as_posix(): path for path in store.rglob("*") if path.is_file()}
    hashes = {key: sha256(comparable(key, paths[key].read_bytes())) for key in sorted(paths)}
    text = "".join(f"{digest}  {key}\n" for key, digest in hashes.items())
    listing.parent.mkdir(exist_ok=True)
    listing.write_text(text, encoding="utf-8")
    return f"{len(hashes):>3} objects {sha256(text.encode())}"


def comparable(key: str, data: bytes) -> bytes:
    """What of an object is the same in every run: of most, all of it.

    Manifests name the command, versions and the date (those of derived stores, the command and date of their source
    too); seals hold the digest of their manifest; and both have a hash of their own contents.
    """
    if MANIFEST.fullmatch(key):
        content = json.loads(data)
        content["attributes"] = without(content["attributes"], "sha256", *PROVENANCE)
    elif SEAL.fullmatch(key):
        content = without(json.loads(data), "sha256")
        manifests = [name for name in content["objects"] if MANIFEST.fullmatch(name)]
        content["objects"] = without(content["objects"], *manifests)
    else:
        return data
    return json.dumps(content).encode()


def describe_training(student: Path) -> str:
    """Some losses in full, and hashes of all records and of the weights."""
    records = [json.loads(line) for line in (student / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    valid = [record["valid_loss"] for record in records if "valid_loss" in record]
    return (
        f"{' '.join(repr(losses[step]) for step in LOSSES)} valid {valid[-1]!r} "
        f"records {sha256_of_json([without(record, *TIMINGS) for record in records])} "
        f"weights {sha256((student / 'model.safetensors').read_bytes())}"
    )


def describe_surroundings() -> str:
    """What the figures depend on besides the code."""
    import torch

    packages = ("torch", "transformers", "deepspeed", "zarr", "numcodecs", "numpy", "scipy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"# {machine}, python {platform.python_version()}, {versions}"


def without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The entries but these, all of which may be absent."""
    return {name: value for name, value in fields.items() if name not in names}


def sha256_of_json(value: Any) -> str:
    return sha256(json.dumps(value).encode())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    raise SystemExit(main())
