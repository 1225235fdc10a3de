"""Generation: the tokens that Transformers generates, timed in turns, in the table and the record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from student_train.evaluate.latency.generation import generate, measure_generation
from student_train.evaluate.latency.records import LatencyReport
from student_train.evaluate.latency.settings import LatencySettings
from student_train.evaluate.random_ids import random_ids
from teacher_cache.errors import SettingsError, StudentError
from tests.student_train.evaluate.causal_models import make_causal

FAMILIES = ("llama", "gpt2", "qwen2", "gemma2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("causal")
    made = {family: make_causal(parent / family, family) for family in FAMILIES}
    # so much larger that it is slower in any weather
    slow = {"num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    return {**made, "slow": make_causal(parent / "slow", "llama", **slow)}


def measure(student: Path, **flags: Any) -> LatencyReport:
    settings = LatencySettings(**{"student": str(student), "runs": 3, "threads": "1", "seconds": 20.0, **flags})
    return measure_generation(settings, devices=("cpu",), show=lambda doing: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_is_the_greedy_one(folders: dict[str, Path], family: str) -> None:
    """As Transformers' own generation gives it, an end of text among it."""
    model = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    prompt_BT = torch.randint(1, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    found, (first, last) = generate(model, prompt_BT, 9)
    expected = model.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), do_sample=False, max_new_tokens=9, pad_token_id=0
    )
    assert torch.equal(found, expected[:, 7:])
    assert 0 < first < last
    # an end of text ends nothing
    model.generation_config.eos_token_id = model.config.eos_token_id = int(found[0, 2])
    assert torch.equal(generate(model, prompt_BT, 9)[0], found)


def test_a_report(folders: dict[str, Path]) -> None:
    report = measure(folders["llama"], teacher=str(folders["slow"]), lengths="8,16", batch_sizes="1,3", new_tokens=4)
    assert report.measurements == ()
    setups = [setup for setup, _ in report.generation]
    assert [(each.batch_size, each.prompt_tokens, each.new_tokens) for each in setups] == [
        (1, 8, 4), (1, 16, 4), (3, 8, 4), (3, 16, 4),
    ]  # fmt: skip
    for _, timing in report.generation:
        assert timing.runs == 3
        assert 0 < timing.first_token_ms <= timing.first_token_p90_ms and timing.tokens_per_second > 0
        assert timing.speedup is not None and timing.speedup > 1
        assert timing.first_token_speedup is not None
    assert report.student_size.parameters < report.teacher_size.parameters  # type: ignore[union-attr]
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["measurements"] == [] and len(record["generation"]) == 4
    assert record["generation"][0]["speedup"] == pytest.approx(
        record["generation"][0]["tokens_per_second"] / record["generation"][0]["teacher_tokens_per_second"]
    )


def test_models_that_end_in_several_ways(tmp_path: Path) -> None:
    """As those that answer conversations do: their configurations name a list of ids, none of which a prompt has."""
    folder = make_causal(tmp_path / "model", "llama", eos_token_id=[5, 7])
    report = measure(folder, lengths="8", batch_sizes="1", new_tokens=4)
    assert [setup.prompt_tokens for setup, _ in report.generation] == [8]
    config = AutoConfig.from_pretrained(folder)
    assert config.eos_token_id == [5, 7]
    assert set(range(300)) - set(random_ids(config, 64, 512).flatten().tolist()) == {5, 7}


def test_prompts_end_where_the_answer_still_fits(folders: dict[str, Path]) -> None:
    report = measure(folders["gpt2"], batch_sizes="1", new_tokens=10)
    assert [setup.prompt_tokens for setup, _ in report.generation] == [32, 54]
    assert "prompts end at 54 tokens" in report.notes[0]
    assert all(timing.speedup is timing.first_token_speedup is None for _, timing in report.generation)
    with pytest.raises(StudentError, match="--lengths up to 54, or fewer --new-tokens"):
        measure(folders["gpt2"], lengths="55", new_tokens=10)
    with pytest.raises(StudentError, match="give fewer --new-tokens"):
        measure(folders["gpt2"], new_tokens=64)


def test_refusals(folders: dict[str, Path], tiny_teacher: Any) -> None:
    with pytest.raises(SettingsError, match="timed in PyTorch alone"):
        measure(folders["gpt2"], backends="pytorch,onnxruntime")
    with pytest.raises(StudentError, match="generates nothing that the other could be compared with"):
        measure(folders["gpt2"], teacher=str(tiny_teacher("bert")))


def test_a_family_without_keys_and_values_to_keep(tmp_path: Path) -> None:
    """It would read one token alone, which is quick."""
    folder = make_causal(tmp_path / "model", "mamba", state_size=4, time_step_rank=4)
    with pytest.raises(StudentError, match="mamba"):
        measure(folder)
