"""What the tests share: the real teacher and text where they are present, and tiny random teachers everywhere.

The real data lies in `../shared/data` beside the repository (KDCACHE_SHARED_DATA names another place). Tests that need
it skip with a reason where it is absent. Tiny teachers are complete Hugging Face folders of every supported family,
with random weights large enough that neighbouring tokens get clearly different outputs; making one takes milliseconds.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kdcache-datasets-")  # some tests look at what is in it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # the cores may be shared
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several workers share the cores: each computes in one thread
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once
if not list(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would print that it found none among a command's results

import atexit
import gc
import http.client
import logging
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
# the cores may be shared: examples have all the time they need, and one that fails can be given again
settings.register_profile("kdcache", deadline=None, print_blob=True)
settings.load_profile("kdcache")

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

    from tests.faulty_server import FaultyServer
    from tests.warm.share import Warm

REPOSITORY = Path(__file__).resolve().parents[1]
BERT_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
ROBERTA_SPECIAL = {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
ROBERTA_FAMILIES = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl")
# 195 pronounceable words, so that with the special ones the vocabulary has 200 entries
TINY_WORDS = [first + second for first in "ba de fi go hu ka le mi no pu ra se ti".split() for second in
              "bo da fe gi ha ko lu me ni po ru sa te vu zo".split()]  # fmt: skip

LONG_FILES = (
    "test_cached_equals_online.py",
    "student_train/engine/test_ranks.py",
    "test_large_vocabulary.py",
    "teacher_cache/build/test_plan.py",
    "student_train/train/test_train_engines.py",
    "test_wheel.py",
    "test_gpu.py",
    "cli/test_demo.py",
    "teacher_cache/test_faults.py",
    "test_mutations.py",
    "test_record_mutations.py",
    "teacher_cache/verify/test_verify.py",
    "student_train/evaluate/finetune/test_finetune.py",
    "student_train/kernels/test_fused.py",
    "student_train/train/test_train_faults.py",
    "cli/test_eval_latency.py",
    "student_train/students/test_export.py",
    "teacher_cache/build/test_workers.py",
    "teacher_cache/build/test_together_faults.py",
    "teacher_cache/teacher/test_shared.py",
    "cli/test_sweep.py",
    "test_cached_causal.py",
    "test_readme.py",
    "cli/test_eval_finetune.py",
    "cli/test_demo_causal.py",
)
"""Files that take the longest, which begin first: one of them at the end would leave the other worker without work."""

TinyTeacher = Callable[..., Path]
TinyTokenizer = Callable[..., "PreTrainedTokenizerFast"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take the longest first, and leave all else in its order."""
    first = {REPOSITORY / "tests" / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_collection_finish() -> None:
    """What has been imported stays: collecting garbage need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def time_to_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows are tried as in good times, however slow the machine is at this moment."""
    monkeypatch.setattr("teacher_cache.build.trial._TEACHER_SECONDS", 1e6)


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Python processes that need not import torch, Transformers and DeepSpeed: `[*warm.python, "-c", code]`."""
    from tests.warm.share import shared_server

    folder, several = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ
    with shared_server(folder.parent if several else folder, alone=not several) as server:
        yield server


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real teacher, tokenizer, text and tasks."""
    folder = Path(os.environ.get("KDCACHE_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "prepare.py").is_file():
        pytest.skip(f"the real data is absent: no prepare.py in {folder}")
    return folder


@pytest.fixture(scope="session")
def unpacked_data(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real teacher and tokenizer as Hugging Face folders: those in .data if complete, else unpacked here."""
    ready = REPOSITORY / ".data"
    needed = ("teacher/model.safetensors", "teacher/tokenizer.json", "tokenizer-xlm-roberta/tokenizer.json")
    if all((ready / name).is_file() for name in needed):
        return ready
    folder = tmp_path_factory.mktemp("data")
    subprocess.run([sys.executable, str(shared_data / "prepare.py"), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def shared_teacher(unpacked_data: Path) -> Path:
    """The real teacher: a BERT masked language model of 6 layers, 384 wide, as a Hugging Face folder."""
    return unpacked_data / "teacher"


@pytest.fixture(scope="session")
def shared_xlm_tokenizer(unpacked_data: Path) -> Path:
    """A tokenizer folder with XLM-R's 250,002 ids."""
    return unpacked_data / "tokenizer-xlm-roberta"


@pytest.fixture(scope="session")
def shared_corpus(shared_data: Path) -> Path:
    """5,966 English Wikipedia articles, one per line, gzip."""
    return shared_data / "corpus" / "en-wikipedia.txt.gz"


# ---- object storage -------------------------------------------------------------------------------------------------


class S3Server:
    """A server that speaks the S3 protocol on this machine and keeps its buckets in memory."""

    def __init__(self, host: str, port: int) -> None:
        self.address = f"{host}:{port}"
        self.endpoint = f"http://{self.address}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection(self.address)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return answer.read()
        finally:
            connection.close()

    def bucket(self, name: str) -> str:
        """Make sure of a bucket; its address."""
        self.request("PUT", f"/{name}")
        return f"s3://{name}"

    def environment(self) -> dict[str, str]:
        """The variables that lead a command to this server."""
        return {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 protocol server on loopback. Its variables are not set: see `s3`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield S3Server(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with the environment that leads to it and to no other."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def faulty_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """What stands between storage and the S3 server; the environment leads to it. `s3.environment()` goes past it."""
    from tests.faulty_server import FaultyServer

    server = FaultyServer(s3.address)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    yield server
    server.close()


# ---- tiny teachers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_tokenizer() -> TinyTokenizer:
    """`tiny_tokenizer(family="bert")`: a word-level tokenizer of 200 ids with the family's special tokens."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> TinyTeacher:
    """`tiny_teacher(family="bert", head=True, seed=0, **config_overrides)`: a Hugging Face folder, made once.

    Families: bert, roberta, xlm-roberta, distilbert, modernbert, electra; 4 layers of 32, 4 heads, 64 positions.
    Overrides use the common names (num_hidden_layers, hidden_size, ...) for every family. `head=False` saves the base
    model without its masked-LM head. Do not write into the folder: other tests share it.
    """
    made: dict[str, Path] = {}

    def make(family: str = "bert", *, head: bool = True, seed: int = 0, **overrides: Any) -> Path:
        key = repr((family, head, seed, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"teacher-{family}")
            save_teacher(folder, family, head=head, seed=seed, overrides=overrides)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def tiny_teacher_copy(tiny_teacher: TinyTeacher, tmp_path: Path) -> TinyTeacher:
    """Like `tiny_teacher`, but a fresh copy that the test may change."""

    def make(*args: Any, **options: Any) -> Path:
        return Path(shutil.copytree(tiny_teacher(*args, **options), tmp_path / "teacher"))

    return make


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 short documents of the tiny tokenizer's words, one per line; the next word depends on the last one."""
    draw = random.Random(20240229)
    lines = []
    for _ in range(200):
        word = draw.randrange(len(TINY_WORDS))
        words = []
        for _ in range(draw.randint(4, 60)):
            words.append(TINY_WORDS[word])
            # mostly one of three followers: something that a student can learn in a few steps
            word = (word * 7 + draw.choice((1, 1, 2, 5, draw.randrange(195)))) % len(TINY_WORDS)
        lines.append(" ".join(words))
    path = tmp_path_factory.mktemp("corpus") / "tiny.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def causal_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama of 4 layers of 32, 4 query and 2 key heads, 105 ids, 64 positions. Read only."""
    from tests import causal_models

    return causal_models.save_teacher(tmp_path_factory.mktemp("causal-teacher"))


@pytest.fixture(scope="session")
def causal_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of up to 30 of the words that `tests/causal_models.py` has tokens for, a line each."""
    from tests import causal_models

    return causal_models.write_corpus(tmp_path_factory.mktemp("causal-corpus") / "text.txt")


def make_tokenizer(family: str = "bert", max_length: int = 64) -> PreTrainedTokenizerFast:
    """One id per word of TINY_WORDS, special tokens first in the family's order; `[CLS] text [SEP]`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ROBERTA_SPECIAL if family in ROBERTA_FAMILIES else BERT_SPECIAL
    ids = {token: index for index, token in enumerate((*special.values(), *TINY_WORDS))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=special["unk"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        pair=f"{special['cls']} $A {special['sep']} $B {special['sep']}",
        special_tokens=[(special[name], ids[special[name]]) for name in ("cls", "sep")],
    )
    names = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def make_config(family: str, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration of the family; `overrides` are attributes by their common names."""
    from transformers import AutoConfig

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        # RoBERTa's positions start after the padding id, so it has two less than its table
        "max_position_embeddings": 66 if family in ROBERTA_FAMILIES else 64,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    if family == "electra":
        settings["embedding_size"] = 16
    if family == "modernbert":
        ids = {"cls_token_id": tokenizer.cls_token_id, "sep_token_id": tokenizer.sep_token_id}
        settings |= {**ids, "local_attention": 16, "global_attn_every_n_layers": 3}
    settings |= overrides
    if family == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
                 "intermediate_size": "hidden_dim"}  # fmt: skip
        settings = {names.get(name, name): value for name, value in settings.items()}
    return AutoConfig.for_model(family, **settings)


def save_teacher(folder: Path, family: str, *, head: bool, seed: int, overrides: dict[str, Any]) -> None:
    """Write a random model of the family and its tokenizer to `folder`."""
    import torch
    from transformers import AutoModel, AutoModelForMaskedLM

    tokenizer = make_tokenizer(family)
    config = make_config(family, tokenizer, overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (AutoModelForMaskedLM if head else AutoModel).from_config(config)
        with torch.no_grad():
            # biases of zero and norms of one would hide a forgotten bias or a forgotten norm
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
