"""Students that do not run are refused by family and shape, before any training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PreTrainedModel

from student_train.students.trial import explain_misfits, try_out
from teacher_cache.errors import SettingsError, StudentError


def test_a_trial_changes_nothing(tiny_teacher: Callable[..., Path]) -> None:
    model = AutoModelForMaskedLM.from_pretrained(tiny_teacher("bert")).train()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    try_out(model, 24)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def squeezebert(**sizes: int) -> PreTrainedModel:
    shape = {"num_hidden_layers": 2, "hidden_size": 24, "embedding_size": 24, "num_attention_heads": 2}
    return AutoModel.from_config(AutoConfig.for_model("squeezebert", **(shape | {"vocab_size": 50} | sizes)))


def test_what_does_not_run_is_named() -> None:
    model = squeezebert()
    try_out(model, 8)
    model.encoder.layers[1].attention.query = torch.nn.Linear(7, 7)
    with pytest.raises(
        StudentError, match="family 'squeezebert' gives no student 2x24:2:3072 that runs .*: some of its"
    ):
        try_out(model, 8)


def test_what_gives_other_vectors_is_named(tiny_teacher: Callable[..., Path]) -> None:
    model = AutoModel.from_pretrained(tiny_teacher("bert"))
    model.encoder.layer[1].register_forward_hook(lambda _, __, states: states[:, ::2])
    with pytest.raises(StudentError, match=r"family 'bert' .*hidden states are .*where \(1, 8, 32\) is needed"):
        try_out(model, 8)


def test_a_refusal_of_ours_stays_as_it_is() -> None:
    config = AutoConfig.for_model("bert")
    with pytest.raises(SettingsError, match="^ours$"), explain_misfits(config, "2x3"):
        raise SettingsError("ours")
    named = pytest.raises(StudentError, match="family 'bert' gives no student 2x3 that runs .KeyError: 'theirs'")
    with named, explain_misfits(config, "2x3"):
        raise KeyError("theirs")
