"""The Python API: its names cost nothing to import, and what its documentation shows runs as it stands."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

import student_train
import teacher_cache
from student_train.registry import ADDED_MAPPINGS, ADDED_METHODS
from teacher_cache.errors import StoreError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "teacher_cache" / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("package", [teacher_cache, student_train])
def test_names_are_there_documented_and_the_ones_that_type_checkers_see(package: Any) -> None:
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    typed = {
        alias.name: node.module for node in imports for alias in node.names if node.module.startswith(package.__name__)
    }
    assert sorted(typed) == sorted(package.__all__) and set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        found, seen = getattr(package, name), getattr(importlib.import_module(typed[name]), name)
        assert found is seen or name == "train"
        assert len(seen.__doc__) > 40 and f"`{name}`" in PAGE.replace(f"{package.__name__}.{name}", name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
        _ = package.nothing


def test_settings_and_registering_need_no_torch() -> None:
    code = """
import sys
from teacher_cache import BuildSettings, DeriveSettings, TargetRequest
from student_train import TrainSettings, register_mapping, train
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_train_is_the_same_whatever_is_imported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wing has the name of the function: Python binds it over whatever else has that name."""
    import student_train.train.train

    after = student_train.train
    monkeypatch.delattr(student_train, "train")
    from student_train import TrainSettings, train

    assert train is after
    with pytest.raises(StoreError, match="no store at 'nothing.zarr'"):
        train(TrainSettings(method="hs", cache=("nothing.zarr",), out="nowhere", device="cpu"))


def test_what_the_page_shows_runs(
    tiny_teacher: Any, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block after block in one namespace, as a reader would paste them; only models, text and sizes are given."""
    monkeypatch.chdir(tmp_path)
    for registry in (ADDED_METHODS, ADDED_MAPPINGS):
        monkeypatch.setattr(registry, "_added", dict(registry._added))
    folder = tiny_teacher("bert")
    config = AutoConfig.from_pretrained(folder)
    given = {"teacher": str(folder), "corpus": str(tiny_corpus), "teacher_width": config.hidden_size}
    config.num_hidden_layers = 2
    torch.manual_seed(0)
    given["student"] = AutoModel.from_config(config)
    assert len(SNIPPETS) == 8
    namespace: dict[str, Any] = {"__name__": "page", **given}
    for number, snippet in enumerate(SNIPPETS, start=1):
        exec(compile(snippet, f"<snippet {number} of teacher_cache/README.md>", "exec"), namespace)
    assert namespace["position"] > 0 and namespace["result"].steps == 10
    assert (tmp_path / "other" / "provenance.json").exists()


USER = """
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from student_train import (
    BlockSampler,
    CacheDataset,
    TrainSettings,
    register_mapping,
    register_method,
    train,
    training_batches,
)
from student_train.losses.sums import LossSum
from student_train.methods.additions import MethodContext
from student_train.methods.base import Counted, StudentNeeds, StudentOutputs
from teacher_cache import (
    BuildSettings,
    DeriveSettings,
    TargetRequest,
    build_cache,
    derive_store,
    describe_store,
    open_caches,
    verify_store,
)
from teacher_cache.contract.batch import Batch
from teacher_cache.contract.targets import View

rows: int = build_cache(BuildSettings(teacher="teacher", corpus=("text.txt",))).rows
hidden: Tensor = open_caches("cache.zarr").read_rows(0, 8, TargetRequest(hidden_layers=(4,)))["plain"].hidden[4]
whole: bool = verify_store("cache.zarr").whole
bits: Mapping[str, float] = describe_store("cache.zarr").bits_per_value()
size: int = derive_store(DeriveSettings(src="cache.zarr", dst="small.zarr")).array_bytes
with training_batches(["a.zarr", "b.zarr"], TargetRequest(logits=True), batch_size=8) as batches:
    for batch in batches:
        ids: Tensor = batch.views["masked"].input_ids_BT
dataset = CacheDataset("cache.zarr", TargetRequest(masked=True), rows="valid")
loader: DataLoader[dict[str, Tensor]] = DataLoader(dataset, sampler=BlockSampler(dataset))


@register_mapping("mine")
def mine(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
    return [(student_layers, teacher_layers)]


@register_method("cosine")
class Cosine:
    counted: Counted = "positions"

    def __init__(self, context: MethodContext) -> None:
        self.layer = context.manifest.teacher.layers
        self.request = TargetRequest(hidden_layers=(self.layer,))

    def needs(self, view: View) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset({2} if view == "plain" else ()))

    def loss(self, outputs: Mapping[View, StudentOutputs], batch: Batch, projections: nn.ModuleDict) -> LossSum:
        cosine_BT = torch.cosine_similarity(outputs["plain"].hidden[2], batch["plain"].hidden[self.layer], dim=-1)
        return LossSum(cosine_BT.sum(), batch["plain"].real_BT().sum())

    def describe(self) -> dict[str, Any]:
        return {}


@register_method("wrong")  # expected error: arg-type
def wrong(context: MethodContext) -> int:
    return 1


seconds: float = train(TrainSettings(method="hs+cosine", mapping="mine")).seconds
train("hs")  # expected error: arg-type
"""


def test_a_strictly_checked_program_sees_the_types(tmp_path: Path) -> None:
    """Takes a second where mypy has checked this tree before, as the linters of `make test` do; a minute else."""
    file = tmp_path / "user.py"
    file.write_text(USER, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(file)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout
    expected = [number for number, line in enumerate(USER.splitlines(), 1) if "# expected error" in line]
    assert [int(line.split(":")[1]) for line in found.splitlines() if ": error:" in line] == expected, found
