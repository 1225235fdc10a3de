"""What is made before the first step: what no loss reaches, what the flags of speed do, which runs may go on."""

import json

import pytest
import torch
from transformers import AutoModel

from student_train.engine.checkpoint import checkpoint_path
from student_train.settings import TrainSettings
from student_train.students.student import build_student
from student_train.train.prepare import prepare_run
from teacher_cache.errors import TrainingError
from teacher_cache.read.reader import CacheReader


def test_what_no_loss_reaches_stays_as_it_was(run_training, tiny_store, tmp_path):
    """Attention transfer ends at the last layer's queries, keys and values: nothing may decay what follows."""
    run_training(tmp_path / "student", method="mha", weights=None, init="random", steps=3)
    trained = AutoModel.from_pretrained(tmp_path / "student").state_dict()
    reader = CacheReader.open(tiny_store)
    before = build_student(
        None, teacher_folder=reader.teacher_folder(), init="random", with_mlm_head=False, seed=0, seq_len=24
    ).model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], trained[name])}
    assert "encoder.layer.1.attention.self.query.weight" in changed
    assert "encoder.layer.0.output.dense.weight" in changed
    assert not {name for name in changed if name.startswith(("encoder.layer.1.output", "encoder.layer.1.intermediate"))}


def test_another_setting_is_refused_by_name(run_training, interrupted, tmp_path):
    with pytest.raises(TrainingError, match=r"--lr was 0\.002 and is 0\.001"):
        run_training(interrupted, resume="auto", lr=1e-3)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 13"):
        run_training(interrupted, resume="auto", steps=13)
    with pytest.raises(TrainingError, match="number of steps was 12 and is 0"):
        run_training(interrupted, resume="auto", steps=0)
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"params": {"eps": 0.5}}, "gradient_clipping": 0.01}))
    differing = (
        r"\(DeepSpeed's gradient_clipping was 1\.0 and is 0\.01; DeepSpeed's optimizer\.params\.eps was None and is"
    )
    with pytest.raises(TrainingError, match=differing):
        run_training(interrupted, resume="auto", deepspeed=str(file))
    with pytest.raises(TrainingError, match="--lr was"):
        run_training(tmp_path / "new", resume=str(checkpoint_path(interrupted, 8)), lr=1e-3)
    assert not (tmp_path / "new").exists()


def test_activations_are_computed_again(tiny_store):
    """The flag does what it says: the backward pass runs each layer once more."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "steps": 1, "device": "cpu"}
    calls = []
    for checkpointing in (False, True):
        run = prepare_run(TrainSettings(**settings, activation_checkpointing=checkpointing))
        seen = []
        run.built.model.encoder.layer[0].attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        losses = run.model.train()(run.stand_in)
        losses["mha"].total.backward()
        calls.append(len(seen))
    assert calls == [1, 2]


def test_compiling_changes_rounding_alone(tiny_store):
    """Through the recorded attention vectors too, and with every gradient."""
    settings = {"method": "mha", "cache": (str(tiny_store),), "student": "1x32", "steps": 1, "device": "cpu"}
    found = []
    for compiled in (False, True):
        run = prepare_run(TrainSettings(**settings, compile=compiled))
        loss = run.model.train()(run.stand_in)["mha"].total
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}))
    (plain, plain_gradients), (fast, gradients) = found
    assert fast == pytest.approx(plain, rel=1e-5)
    assert gradients.keys() == plain_gradients.keys() and len(gradients) > 8
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
