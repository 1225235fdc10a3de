"""Teachers that two processes hold together: what they compute is what one process computes, but for rounding."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from teacher_cache.build.build import build_cache
from teacher_cache.build.plan import BuildPlan
from teacher_cache.build.settings import BuildSettings
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import SettingsError, TeacherError
from teacher_cache.read.reader import CacheReader
from teacher_cache.storage.local import LocalStorage
from teacher_cache.teacher.processes import Processes
from teacher_cache.teacher.shared import refuse_unshared
from teacher_cache.teacher.teacher import Teacher
from teacher_cache.verify.verify import verify_store
from tests import causal_models
from tests.teacher_cache.teacher.test_placing import STARTS, everything
from tests.warm.share import Warm

ROUNDING = 1e-5
"""Share of a vector's length; a few units in the last place of each of its sums."""
CAUSAL = ("llama", "qwen3", "mixtral", "phi3", "gpt_neox")
"""Of these, Phi-3 computes all of attention in every process, Mixtral shares its experts, GPT-NeoX joins q, k and v."""
EVEN = causal_models.COMMON["vocab_size"] + 1
"""Ids: some versions of Transformers cut the head's logits into equal parts only."""


class Found(dict[str, Any]):
    """What both processes found, by name; teachers by family, and the settings of the build."""

    teachers: dict[str, tuple[str, bool]]
    settings: dict[str, Any]


@pytest.fixture(scope="module")
def found(
    warm: Warm, tiny_teacher: Callable[..., Path], causal_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Found:
    folder = tmp_path_factory.mktemp("shared")
    teachers = {
        family: (str(causal_models.save_teacher(folder / family, family, vocab_size=EVEN)), True) for family in CAUSAL
    }
    # soft caps, which no attention can be read with
    teachers["gemma2"] = str(causal_models.save_teacher(folder / "gemma2", "gemma2", vocab_size=EVEN)), False
    teachers["eurobert"] = str(tiny_teacher("eurobert", num_key_value_heads=2)), True
    other = str(causal_models.save_teacher(folder / "other", seed=1, vocab_size=EVEN))
    build = {
        "teacher": teachers["llama"][0], "corpus": (str(causal_corpus),), "out": str(folder / "together.zarr"),
        "seq_len": 24, "max_rows": 20, "block_rows": 8, "batch_size": 4, "targets": "logits,hidden,attention",
        "layers": "2,4", "attention_layer": 3, "precision": "float16", "logits": "topk", "k": 8, "device": "cpu",
    }  # fmt: skip
    orders = {
        "teachers": teachers,
        "refused": {"gpt2": str(causal_models.save_teacher(folder / "gpt2", "gpt2"))},
        "build": build,
        "mixed": (teachers["llama"][0], other),
    }
    torch.save(orders, folder / "orders.pt")
    command = [*warm.torchrun(2), str(Path(__file__).with_name("shared_script.py")), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other_one = (torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2))
    result = Found({name: (one[name], other_one[name]) for name in one})
    result.teachers, result.settings = teachers, build
    return result


@pytest.mark.parametrize("family", [*CAUSAL, "gemma2", "eurobert"])
def test_two_processes_compute_what_one_computes(found: Found, family: str) -> None:
    folder, attention = found.teachers[family]
    whole = Teacher.load(folder, device="cpu")
    if attention:
        whole.tap()
    whole.start()
    want = everything(whole, None, attention)
    want |= {f"isolated {name}": values for name, values in everything(whole, STARTS, attention).items()}
    have, theirs = found[family]
    shares = int(have.pop("shares"))
    assert have.keys() == want.keys()
    for name, values in want.items():
        assert have[name].shape == values.shape, name
        distance = (have[name] - values).norm(dim=-1) / values.norm(dim=-1)
        assert float(distance.max()) < ROUNDING, name
        assert torch.equal(have[name], theirs[name]), "the other process is told the same"
    assert shares < 0.6 * sum(parameter.numel() for parameter in whole.model.parameters())


def targets_of(store: str) -> list[torch.Tensor]:
    reader = CacheReader.open(store)
    request = TargetRequest(hidden_layers=(2, 4), attention_layers=(3,), logits=True)
    (batch,) = reader.read_rows(0, reader.rows, request).values()
    vectors, logits = batch.attention[3], batch.logits
    assert logits is not None
    return [
        *batch.hidden.values(), vectors.query_BTD, vectors.key_BTD, vectors.value_BTD,
        *(values for values in vars(logits).values() if isinstance(values, torch.Tensor)),
    ]  # fmt: skip


def test_a_build_that_failed_half_way_is_finished_and_has_the_targets_of_one_process(
    found: Found, tmp_path: Path
) -> None:
    failed, followed = found["no room"]
    assert failed == "SpaceError: no room"
    assert "process 1 of 2 ends because the first one has failed" in followed
    reports = found["build"]
    assert reports[0] == reports[1]
    assert reports[0].rows == 20 and 0 < reports[0].computed_rows < 20
    together = found.settings["out"]
    assert verify_store(LocalStorage(together)).whole
    alone = replace(BuildSettings(**found.settings), out=str(tmp_path / "alone.zarr"))
    build_cache(alone)
    manifests = [CacheReader.open(store).manifest for store in (together, alone.out)]
    assert manifests[0].targets.attention[0].form == "replayed"
    assert replace(manifests[0], created="", command="") == replace(manifests[1], created="", command="")
    for have, want in zip(targets_of(together), targets_of(alone.out), strict=True):
        torch.testing.assert_close(have.float(), want.float(), rtol=2e-3, atol=2e-3)


def test_a_plan_is_made_together(found: Found) -> None:
    plan, theirs = found["plan"]
    assert isinstance(plan, BuildPlan) and plan == theirs
    assert (plan.state, plan.manifest.rows, plan.device) == ("new", 20, "cpu")


def test_what_cannot_be_shared_is_refused_in_all_processes(found: Found) -> None:
    for message in found["gpt2"]:
        assert "of family 'gpt2' has no tensor-parallel plan in Transformers" in message
        assert "leave --tensor-parallel out (--device-map auto" in message
    for message in found["mixed"]:
        assert "process 1 of 2 has another teacher than the first one" in message


def test_shares_that_compute_something_else_are_refused(found: Found) -> None:
    leading, following = found["disorder"]
    assert leading.startswith("TeacherError") and "attention 1 (query) of its shares are off by 1." in leading
    assert "the first one has failed" in following


def test_heads_that_cannot_be_dealt_out_are_refused(causal_teacher: Path, tmp_path: Path) -> None:
    refuse_unshared(str(causal_teacher), None, 2)
    with pytest.raises(TeacherError, match=r"has 4 attention heads, which 3 processes cannot share evenly"):
        refuse_unshared(str(causal_teacher), None, 3)
    with pytest.raises(TeacherError, match=r"has 2 heads of keys and values, which 4 processes cannot share evenly"):
        refuse_unshared(str(causal_teacher), None, 4)
    with pytest.raises(TeacherError, match=r"model.gguf' is a GGUF file, .* nor read in parts"):
        refuse_unshared(str(tmp_path / "model.gguf"), None, 2)


def test_a_process_alone_shares_with_nobody() -> None:
    with pytest.raises(SettingsError, match="this one is alone: .* `torchrun --nproc-per-node 2"):
        Processes.join(0, 1, None, "cpu")
