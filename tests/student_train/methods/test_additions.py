"""Methods of other packages: what their factory is given, what it must give, and a whole training with one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from cli import kdtrain
from student_train import TrainSettings, register_mapping, register_method, train
from student_train.losses.sums import LossSum
from student_train.methods.additions import MethodContext, make_added_method, reads_logits
from student_train.methods.base import Counted, StudentNeeds
from student_train.methods.model import DistillationModel
from student_train.methods.objective import make_objective
from student_train.methods.projections import make_map
from student_train.run_files import read_records
from student_train.student_shape import read_shape
from student_train.students.shape import derive_config
from student_train.students.student import build_student, plan_student
from teacher_cache import TargetRequest, open_caches
from teacher_cache.errors import SettingsError, TargetsError

if TYPE_CHECKING:
    from tests.student_train.conftest import Site

COSINE = """
import torch
from student_train import register_mapping, register_method
from student_train.losses.sums import LossSum
from student_train.methods.base import StudentNeeds
from teacher_cache import TargetRequest


@register_method("cosine")
class Cosine:
    counted = "positions"

    def __init__(self, context):
        self.pairs = context.layer_mapping().pairs[-1:]
        self.request = TargetRequest(hidden_layers=(self.pairs[0][1],))

    def needs(self, view):
        return StudentNeeds(hidden_layers=frozenset({self.pairs[0][0]} if view == "plain" else ()))

    def loss(self, outputs, batch, projections):
        (student, teacher), targets = self.pairs[0], batch["plain"]
        cosine = torch.cosine_similarity(outputs["plain"].hidden[student], targets.hidden[teacher], dim=-1)
        real = targets.real_BT()
        return LossSum(((1 - cosine) * real).sum(), real.sum())

    def describe(self):
        return {"pairs": [list(pair) for pair in self.pairs]}


@register_mapping("backwards")
def backwards(teacher_layers, student_layers):
    return [(i, teacher_layers - i + 1) for i in range(1, student_layers + 1)]
"""


def install_cosine(site: Site, version: str = "1.2") -> None:
    site.install("their_cosine", COSINE, package="their-package", version=version,
                 methods="cosine = their_cosine", mappings="backwards = their_cosine")  # fmt: skip


def flags(store: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--cache", str(store), "--out", str(out), "--student", "2x32", "--steps", "4", "--batch-size", "8"]
    return [*fixed, "--save-every", "2", "--valid-every", "4", "--device", "cpu", "--method", "hs+cosine", *more]


def test_a_training_with_a_method_and_a_mapping_of_another_package(
    site: Site, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install_cosine(site)
    more = ["--weights", "1,0.5", "--mapping", "backwards"]
    assert kdtrain.main(flags(tiny_store, tmp_path / "one", *more)) == 0, capsys.readouterr().err
    assert "cosine   weight 0.5: pairs 2<-3" in capsys.readouterr().err
    records = [record for record in read_records(tmp_path / "one" / "metrics.jsonl") if "loss" in record]
    for record in records:
        assert record["loss"] == pytest.approx(record["hs"] + 0.5 * record["cosine"])
    provenance = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert provenance["objective"]["cosine"] == {"pairs": [[2, 3]]}
    assert provenance["objective"]["hs"] == {"mapping": "backwards", "pairs": [[1, 4], [2, 3]]}
    origin = {"module": "their_cosine", "package": "their-package", "version": "1.2"}
    assert provenance["additions"] == {"method cosine": origin, "mapping backwards": origin}

    # goes on exactly, with that version of the package alone
    halfway = tmp_path / "one" / "checkpoints" / "step-00000002"
    again = flags(tiny_store, tmp_path / "again", *more, "--resume", str(halfway))
    assert kdtrain.main(again) == 0, capsys.readouterr().err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again")]
    assert weights[0] == weights[1]
    shutil.rmtree(site.folder / "their_package-1.2.dist-info")
    install_cosine(site, "1.3")
    assert kdtrain.main(flags(tiny_store, tmp_path / "third", *more, "--resume", str(halfway))) == 1
    assert "method cosine was {'module': 'their_cosine'" in capsys.readouterr().err


def test_a_training_from_python_with_what_was_registered_there(site: Site, tiny_store: Path, tmp_path: Path) -> None:
    @register_mapping("crossed")
    def crossed(teacher_layers: int, student_layers: int) -> list[tuple[int, int]]:
        return [(i, teacher_layers - i + 1) for i in range(1, student_layers + 1)]

    settings = TrainSettings(
        method="hs", mapping="crossed+last1", cache=(str(tiny_store),), out=str(tmp_path / "student"), student="2x32",
        steps=2, batch_size=8, device="cpu",
    )  # fmt: skip
    assert train(settings).steps == 2
    provenance = json.loads((tmp_path / "student" / "provenance.json").read_text())
    assert provenance["objective"]["hs"]["pairs"] == [[1, 4], [2, 3], [2, 4]]
    assert provenance["additions"]["mapping crossed"]["module"] == __name__


# ---- what a factory is given, and what it must give -----------------------------------------------------------------


LAST = TargetRequest(hidden_layers=(4,))


@dataclass(frozen=True, kw_only=True)
class Given:
    """A method that is as it is told to be: the squared error of one hidden state through one map."""

    request: TargetRequest = LAST
    counted: Counted = "positions"
    head: bool = False

    def needs(self, view: str) -> StudentNeeds:
        return StudentNeeds(hidden_layers=frozenset({2} if view == "plain" else ()), head=self.head)

    def loss(self, outputs: Any, batch: Any, projections: nn.ModuleDict) -> LossSum:
        targets = batch["plain"]
        mapped_BTD = projections["to_teacher"](outputs["plain"].hidden[2])
        errors_BT = (mapped_BTD - targets.hidden[4]).square().sum(-1)
        return LossSum((errors_BT * targets.real_BT()).sum(), targets.real_BT().sum())

    def describe(self) -> dict[str, Any]:
        return {}


def maps(student_width: int = 24) -> nn.ModuleDict:
    return nn.ModuleDict({"to_teacher": make_map(student_width, 32, torch.Generator().manual_seed(0))})


def student_config(folder: Path, shape: str = "2x24:4") -> PreTrainedConfig:
    return derive_config(AutoConfig.from_pretrained(folder), read_shape(shape).completed(), (2, 4))


def test_the_factory_is_given_cache_student_and_flags(site: Site, tiny_teacher: Any, live_cache: Any) -> None:
    seen: list[MethodContext] = []

    @register_method("given")
    def make(context: MethodContext) -> tuple[Given, nn.ModuleDict]:
        seen.append(context)
        return Given(), maps()

    cache, config = live_cache(tiny_teacher(), hidden=(4,), attention=(3,)), student_config(tiny_teacher())
    objective = make_objective(
        {"mha": 1.0, "given": 0.5}, source=cache, student=config, mapping="last", relation_weights=(1, 2, 3), seed=7
    )
    (context,) = seen
    assert context.source is cache and context.student is config and context.manifest is cache.manifest
    assert (context.relation_weights, context.seed) == ((1, 2, 3), 7)
    assert context.layer_mapping().pairs == ((1, 3), (2, 4))
    # one request for all, so that whoever lacks something learns of everything
    assert cache.required == [TargetRequest(hidden_layers=(4,), attention_layers=(3,))]
    assert list(objective.projections["given"]) == ["to_teacher"] and objective.weights["given"] == 0.5


def test_its_loss_and_the_gradient_of_its_maps(site: Site, tiny_teacher: Any, live_cache: Any) -> None:
    register_method("given")(lambda context: (Given(), maps()))
    cache = live_cache(tiny_teacher(), hidden=(4,))
    built = build_student(
        plan_student("2x24:4", teacher_folder=cache.folder, init="random", with_mlm_head=False, seq_len=12), seed=0
    )
    model = DistillationModel(built.model, make_objective({"given": 1.0}, source=cache, student=built.model.config))
    batch = cache.batch([12, 5, 9])
    loss = model(batch)["given"]
    targets = batch["plain"]
    states = built.model(
        input_ids=targets.input_ids_BT.long(), attention_mask=targets.real_BT().long(), output_hidden_states=True
    ).hidden_states[2]
    linear = model.objective.projections["given"]["to_teacher"]
    by_hand = sum(
        float(
            (
                states[row, :length].detach() @ linear.weight.T.detach()
                + linear.bias.detach()
                - targets.hidden[4][row, :length]
            )
            .square()
            .sum()
        )
        for row, length in enumerate([12, 5, 9])
    )
    assert loss.total.item() == pytest.approx(by_hand, rel=1e-4) and int(loss.count) == 26
    loss.total.backward()
    assert linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0


def test_attention_of_the_student_is_recorded_for_a_method_that_reads_none_of_the_teacher(
    site: Site, tiny_teacher: Any, live_cache: Any
) -> None:
    class Sparse:
        request = TargetRequest(hidden_layers=(4,))
        counted = "positions"

        def __init__(self, context: MethodContext) -> None: ...

        def needs(self, view: str) -> StudentNeeds:
            return StudentNeeds(attention_layers=frozenset({1} if view == "plain" else ()))

        def loss(self, outputs: Any, batch: Any, projections: nn.ModuleDict) -> LossSum:
            return LossSum(outputs["plain"].attention[1].query_BTD.abs().sum(), batch["plain"].real_BT().sum())

        def describe(self) -> dict[str, Any]:
            return {}

    register_method("sparse")(Sparse)
    cache = live_cache(tiny_teacher(), hidden=(4,))
    built = build_student(
        plan_student("2x24:4", teacher_folder=cache.folder, init="random", with_mlm_head=False, seq_len=12), seed=0
    )
    model = DistillationModel(built.model, make_objective({"sparse": 1.0}, source=cache, student=built.model.config))
    assert model(cache.batch([12, 5]))["sparse"].total.item() > 0


def test_hidden_states_come_as_the_teacher_gave_them_though_hs_would_take_coordinates(
    site: Site, make_tiny_store: Any, tmp_path: Path
) -> None:
    source = open_caches(make_tiny_store(tmp_path / "nmse.zarr", max_rows=64, precision="nmse:1e-2"))
    config = student_config(source.teacher_folder(), "2x32:4")
    register_method("given")(lambda context: (Given(), maps(32)))
    alone = make_objective({"hs": 1.0}, source=source, student=config, mapping="1:2,2:4")
    both = make_objective({"hs": 1.0, "given": 1.0}, source=source, student=config, mapping="1:2,2:4")
    assert alone.request.rotated_layers == (2, 4) and both.request.rotated_layers == (2,)
    # what hs costs does not depend on the coordinates
    built = build_student(
        plan_student("2x32:4", teacher_folder=source.teacher_folder(), init="random", with_mlm_head=False, seq_len=24),
        seed=0,
    )
    costs = []
    for objective in (alone, both):
        losses = DistillationModel(built.model, objective)(source.read_rows(0, 8, objective.request))
        costs.append(losses["hs"].total.item())
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)

    rotated = Given(request=TargetRequest(hidden_layers=(4,), rotated_layers=(4,)))
    register_method("coordinates")(lambda context: (rotated, maps(32)))
    with pytest.raises(SettingsError, match="--method coordinates reads hidden state 4 in the coordinates"):
        make_objective({"coordinates": 1.0, "given": 1.0}, source=source, student=config)


@pytest.mark.parametrize(
    "made, told",
    [
        (None, "since NoneType has no counted, request, needs, loss, describe"),
        (Given(counted="tokens"), "`counted` is 'tokens' and not one of 'positions', 'places', 'rows'"),  # type: ignore[arg-type]
        (Given(request=(4,)), r"`request` is \(4,\)"),  # type: ignore[arg-type]
        ((Given(), {}), "its maps are dict"),
        (Given(head=True), "registered without `reads_logits=True`"),
    ],
)
def test_what_is_no_method_is_refused(site: Site, tiny_teacher: Any, live_cache: Any, made: Any, told: str) -> None:
    register_method("given")(lambda context: made)
    cache = live_cache(tiny_teacher(), hidden=(4,))
    with pytest.raises(SettingsError, match=told):
        make_added_method("given", MethodContext(source=cache, student=student_config(tiny_teacher())))


def test_targets_that_the_cache_lacks_are_refused_for_all_methods_at_once(
    site: Site, tiny_teacher: Any, tiny_store: Path
) -> None:
    register_method("given")(lambda context: (Given(request=TargetRequest(hidden_layers=(9,))), maps()))
    with pytest.raises(TargetsError, match="lacks hidden 9, attention 2"):
        make_objective(
            {"mha": 1.0, "given": 1.0}, source=open_caches(tiny_store), student=student_config(tiny_teacher()),
            attention_layer="2",
        )  # fmt: skip


def test_a_failing_factory_keeps_its_error_and_says_whose_it_is(site: Site, tiny_teacher: Any, live_cache: Any) -> None:
    @register_method("failing")
    def make(context: MethodContext) -> Given:
        raise ZeroDivisionError("theirs")

    cache = live_cache(tiny_teacher(), hidden=(4,))
    with pytest.raises(ZeroDivisionError, match="theirs") as caught:
        make_objective({"failing": 1.0}, source=cache, student=student_config(tiny_teacher()))
    assert "made --method failing" in caught.value.__notes__[0]


@pytest.mark.parametrize("name", ["mha", "loss", "grad_norm", "keys", "a.b"])
def test_names_with_another_meaning_are_refused(site: Site, name: str) -> None:
    with pytest.raises(SettingsError):
        register_method(name)(lambda context: Given())


def test_whether_the_student_gets_a_head(site: Site) -> None:
    register_method("of-logits", reads_logits=True)(lambda context: Given(head=True))
    register_method("of-states")(lambda context: Given())
    assert [reads_logits(name) for name in ("od", "mlm", "hs", "of-logits", "of-states")] == [True] * 2 + [
        False,
        True,
        False,
    ]
