"""Hidden states in safetensors files: every order of axes gives the store that a build makes, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher_cache.contract.batch import TargetRequest
from teacher_cache.errors import DistillationError, SettingsError, SourceError, TeacherError
from teacher_cache.format.protocol import SEAL
from teacher_cache.importing.hidden_folders import HiddenSource, parse_layer_list
from teacher_cache.importing.importing import import_store
from teacher_cache.importing.settings import ImportSettings
from teacher_cache.read.info import describe_store
from teacher_cache.verify.verify import verify_store
from tests.teacher_cache.importing.samples import Sample, by_row, read

Asked = Callable[..., ImportSettings]
STATES = TargetRequest(hidden_layers=(2, 4), next_tokens=True)
ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "layers first": lambda states_LTD: states_LTD,
    "tokens first": lambda states_LTD: states_LTD.transpose(0, 1),
    "side by side": lambda states_LTD: states_LTD.transpose(0, 1).flatten(1),
    "a batch of one": lambda states_LTD: states_LTD.transpose(0, 1).flatten(1)[None],
    "a batch of one, layers apart": lambda states_LTD: states_LTD.transpose(0, 1)[None],
}
Tensors = dict[str, torch.Tensor]


def write_folder(sample: Sample, folder: Path, order: str = "tokens first", names: str = "input_ids") -> Path:
    """A file for each row with hidden states 4 and 2, in that order."""
    folder.mkdir()
    for number, row in enumerate(sample.rows):
        states = ORDERS[order](sample.hidden[number][[4, 2]]).contiguous()
        save_file({names: torch.tensor(row), "hidden_states": states}, folder / f"data_{number}.safetensors")
    return folder


@pytest.mark.parametrize("order", ORDERS)
def test_hidden_states_are_what_a_build_keeps(sample: Sample, asked: Asked, tmp_path: Path, order: str) -> None:
    names = "token_ids" if order == "tokens first" else "input_ids"
    import_store(settings := asked(write_folder(sample, tmp_path / "states", order, names), layers="4,2"))
    have, want = read(settings.out, STATES), read(sample.store, STATES)
    mine = by_row(have)
    for row, place in by_row(want).items():
        for layer in (2, 4):
            values = [one.hidden[layer][at, : len(row)] for one, at in ((have, mine[row]), (want, place))]
            assert torch.allclose(values[0], values[1], atol=1e-3, rtol=2e-3)
        assert have.places is not None and int(have.places.count_B[mine[row]]) == len(row) - 1
    assert describe_store(settings.out).manifest.imported == "hidden"
    assert verify_store(settings.out).whole


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
@pytest.mark.parametrize("precision", ["int8", "nmse:1e-2"])
def test_states_that_are_the_same_everywhere_are_refused(
    sample: Sample, asked: Asked, tmp_path: Path, precision: str, value: float
) -> None:
    """Losses are shares of a variance that there is not: such a store could not be read."""
    folder = write_folder(sample, tmp_path / "states")
    for file in folder.iterdir():
        tensors = load_file(file)
        tensors["hidden_states"][:, 0] = value
        save_file(tensors, file)
    settings = asked(folder, layers="4,2", precision=precision)
    with pytest.raises(TeacherError, match="hidden state 4 is the same at every token .*leave 4 out of --layers"):
        import_store(settings)
    assert not (Path(settings.out) / SEAL).exists()


def test_calibrated_states_and_masks(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """In an nmse codec the error is what is declared, and the loss mask says after which tokens one is learnt."""
    folder = write_folder(sample, tmp_path / "states")
    for number, row in enumerate(sample.rows):
        states = sample.hidden[number][[4, 2]].transpose(0, 1).bfloat16().contiguous()
        learnt = torch.arange(len(row)) >= 3
        tensors = {"input_ids": torch.tensor(row), "hidden_states": states, "loss_mask": learnt.long()}
        save_file(tensors, folder / f"data_{number}.safetensors")
    import_store(settings := asked(folder, layers="4,2", precision="nmse:1e-2"))
    manifest = describe_store(settings.out).manifest
    assert manifest.dtype == "bfloat16" and set(manifest.calibration) == {"hidden/2", "hidden/4"}
    batch = read(settings.out, STATES)
    mean_D = torch.cat([one[4] for one in sample.hidden]).mean(0)
    lost, whole = 0.0, 0.0
    for number, row in enumerate(sample.rows):
        place = by_row(batch)[tuple(row)]
        assert batch.places is not None
        positions = batch.places.positions_BM[place, : batch.places.count_B[place]]
        assert positions.tolist() == list(range(2, len(row) - 1))
        want_TD = sample.hidden[number][4]
        lost += float((batch.hidden[4][place, : len(row)] - want_TD).square().sum())
        whole += float((want_TD - mean_D).square().sum())
    assert lost / whole < 0.03


def test_a_row_of_as_many_tokens_as_layers_is_read_as_the_others(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    """Alone its axes could be either; among others they are theirs."""
    layers, folder = [0, 1, 2, 3, 4], tmp_path / "states"
    folder.mkdir()
    for number, tokens in enumerate((5, 7)):
        states = sample.hidden[0][layers, :tokens].transpose(0, 1).contiguous()
        tensors = {"input_ids": torch.tensor(sample.rows[0][:tokens]), "hidden_states": states}
        save_file(tensors, folder / f"{number}.safetensors")
    import_store(settings := asked(folder, layers="0,1,2,3,4"))
    batch = read(settings.out, TargetRequest(hidden_layers=(1, 4)))
    place = by_row(batch)[tuple(sample.rows[0][:5])]
    assert torch.allclose(batch.hidden[1][place, :5], sample.hidden[0][1, :5], atol=1e-3, rtol=2e-3)
    with pytest.raises(SettingsError, match="which axis is that of the layers cannot be told"):
        import_store(asked(folder / "0.safetensors", layers="0,1,2,3,4", out=str(tmp_path / "other.zarr")))


CHANGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no states": (lambda one: one.pop("hidden_states"), "holds input_ids and lacks 'hidden_states'"),
    "no ids": (lambda one: one.pop("input_ids"), "holds hidden_states and lacks 'input_ids'"),
    "another width": (
        lambda one: one.update(hidden_states=one["hidden_states"][..., :100].contiguous()),
        r"have the shape \(\d+, 2, 100\) for \d+ tokens, 2 layers and the teacher's width of 128",
    ),
    "more tokens": (
        lambda one: one.update(input_ids=torch.cat([one["input_ids"], one["input_ids"][:1]])),
        "have the shape .* for",
    ),
    "infinite": (lambda one: one["hidden_states"][1, 0].fill_(float("inf")), "infinite or not a number"),
    "ids that are none": (lambda one: one.update(input_ids=one["input_ids"].float()), "its ids are torch.float32"),
    "beyond the tokenizer": (lambda one: one["input_ids"].fill_(5000), "token id 5000 is none of the tokenizer"),
    "a mask of another row": (lambda one: one.update(loss_mask=torch.ones(3)), "'loss_mask' has the shape"),
    "integers": (lambda one: one.update(hidden_states=one["hidden_states"].long()), "states of type I64"),
    "another type": (lambda one: one.update(hidden_states=one["hidden_states"].half()), "of another type than"),
    "another order": (
        lambda one: one.update(hidden_states=one["hidden_states"].transpose(0, 1).contiguous()),
        "others of .tokens, 2 layers, width.",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_file_cannot_be(sample: Sample, asked: Asked, tmp_path: Path, name: str) -> None:
    change, told = CHANGES[name]
    folder = write_folder(sample, tmp_path / "states")
    states = sample.hidden[3][[4, 2]].transpose(0, 1).contiguous()
    tensors = {"input_ids": torch.tensor(sample.rows[3]), "hidden_states": states}
    change(tensors)
    save_file(tensors, folder / "data_3.safetensors")
    settings = asked(folder, layers="4,2")
    with pytest.raises(SourceError, match=told):
        import_store(settings)
    assert not Path(settings.out).exists()


def test_what_is_no_such_file(sample: Sample, asked: Asked, tmp_path: Path) -> None:
    folder = write_folder(sample, tmp_path / "states")
    (folder / "data_3.safetensors").write_bytes(b"12345678901234567890")
    with pytest.raises(SourceError, match="data_3.safetensors' cannot be read .SafetensorError"):
        import_store(asked(folder, layers="4,2"))
    (folder / "data_3.ckpt").write_bytes(b"")
    with pytest.raises(SourceError, match="does not end in"):
        import_store(asked(folder / "data_3.ckpt", layers="4,2"))


@pytest.mark.parametrize(
    "changes, kind, told",
    [
        ({"layers": None}, SettingsError, "--layers None does not say which layers' hidden states the files hold"),
        ({"layers": "2"}, SettingsError, "--layers names 1 layers, and the files have hidden states of the shapes"),
        ({"k": 3}, SettingsError, "--k 3 would change nothing: it means nothing to hidden states"),
        ({"shape": "vllm"}, SourceError, "holds hidden states, and other files of the source, or --shape"),
    ],
)
def test_what_cannot_be_asked_of_hidden_states(
    sample: Sample, asked: Asked, tmp_path: Path, changes: dict[str, Any], kind: type[DistillationError], told: str
) -> None:
    settings = replace(asked(write_folder(sample, tmp_path / "states"), layers="4,2"), **changes)
    with pytest.raises(kind, match=told):
        import_store(settings)


@pytest.mark.parametrize(
    "text, told", [("a", "does not say"), ("1,1", "twice"), ("5", "names layer 5"), ("", "not say")]
)
def test_layers_that_are_none(text: str, told: str) -> None:
    assert parse_layer_list("4, 0", 4) == (4, 0)
    with pytest.raises(SettingsError, match=told):
        parse_layer_list(text, 4)


def test_states_that_are_computed_anew_meanwhile_are_refused(sample: Sample, tmp_path: Path) -> None:
    files = sorted(write_folder(sample, tmp_path / "states").iterdir())
    source = HiddenSource(files, [4, 2], width=sample.hidden[0].shape[-1], last=4)
    source.read(0)
    tensors = load_file(files[1])
    save_file({**tensors, "hidden_states": tensors["hidden_states"] + 1}, files[1])
    with pytest.raises(SourceError, match="has changed while it was imported"):
        source.read(1)
