"""Students: a model of the asked shape with its first weights, in two steps.

`plan_student` takes what was asked for (a shape such as `3x384` or a Hugging Face folder) and the teacher's folder
inside the cache, and says what the student will be. It refuses what cannot be: another vocabulary would read other
words, too few positions would not read the rows at all. It reads configurations and tokenizers, and makes no weight.
`build_student` then makes a plain Transformers model with its first weights. Parts that are there only for the
training are added elsewhere and never enter this model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from student_train.init_plan import InitPlan, read_init
from student_train.student_shape import StudentShape, read_student
from student_train.students.initialise import (
    ReadSample,
    TakenOver,
    check_takeover,
    copy_teacher,
    copy_whole,
    takes_layers,
)
from student_train.students.layer_importance import LayerChoice, RowsWithTargets, choose_layers
from student_train.students.pretrained import (
    check_family,
    has_weights,
    head_name,
    load_config,
    load_model,
    load_teacher_tokenizer,
    place_for,
    vocabulary_difference,
)
from student_train.students.shape import derive_config, shape_in_words, shape_of, student_shape
from student_train.students.trial import check_isolation, explain_misfits, try_out
from student_train.students.vocabulary.kept_ids import KEPT_IDS, KeptIds, read_kept_ids
from student_train.students.vocabulary.weights import trim_weights
from teacher_cache.contract.manifest import ModelKind
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import encoder_of, kind_of, pooler_option, position_limit, with_head

ReadTargets = Callable[[], RowsWithTargets]
"""Reads the rows that the layers of a student are chosen on; called only where they are."""


@dataclass(frozen=True, kw_only=True)
class StudentPlan:
    """What a student will be. `layers` are the teacher layers behind its own; none for a student from a folder.

    Where `init` leaves the choice of layers to rows, they and the settings of a configuration that are kept per layer
    stand in for those that `build_student` finds.
    `isolated` says whether the documents of a row must not see each other.
    """

    config: PreTrainedConfig
    init: InitPlan
    layers: tuple[int, ...]
    teacher_folder: Path
    with_mlm_head: bool
    seq_len: int
    isolated: bool = False


@dataclass(frozen=True, kw_only=True)
class BuiltStudent:
    """A student, one line on where its weights come from, and what was copied.

    `whole_layers` says whether its layers are the teacher's, bit for bit; what came from a folder does not count.
    """

    model: PreTrainedModel
    description: str
    copied: tuple[str, ...]
    whole_layers: bool


def plan_student(
    spec: str | None,
    *,
    teacher_folder: Path,
    init: str,
    with_mlm_head: bool,
    seq_len: int,
    isolated: bool = False,
    has_distribution: bool = False,
) -> StudentPlan:
    """What the student will be.

    Args:
        spec: None for the teacher's default student, a shape (see `read_shape`), or a Hugging Face folder.
        teacher_folder: Hugging Face folder of the teacher inside the cache.
        init: `auto`, `random`, `embeddings`, `teacher:2,4,6`, `teacher:last` or a folder; with a folder as `spec`,
            `auto` takes that folder's weights.
        with_mlm_head: whether the student needs a head over the vocabulary (to learn the output distribution).
        seq_len: positions that the student must be able to read.
        isolated: whether the documents of a row must not see each other.
        has_distribution: whether the cache holds the teacher's distribution, which layers can be chosen by.

    Raises:
        SettingsError: the shape or the initialisation cannot be read, or does not fit the teacher or the cache.
        StudentError: a folder or the teacher's tokenizer cannot be read; the initialisation takes weights of a teacher
            whose targets were imported without them; a folder predicts masked tokens where the
            teacher predicts next ones or the other way round, has another vocabulary, or too few positions.
    """
    teacher_config = load_config(teacher_folder)
    load_teacher_tokenizer(teacher_folder)  # the export needs it, and after the training is too late to find out
    asked = read_student(spec)
    folder = asked if isinstance(asked, Path) else None
    plan = read_init(init, from_folder=folder)
    if plan.insists and not has_weights(teacher_folder):
        raise StudentError(
            f"--init {init!r} asks for weights of the teacher, and the cache holds none: its targets were imported, "
            "and computed elsewhere; start from --init random, or from the folder of a model, such as --student FOLDER"
        )
    if plan.by_importance and not has_distribution:
        raise SettingsError(
            f"--init {init!r} chooses layers by the loss on the teacher's distribution, and this cache holds none: "
            "give teacher:uniform, teacher:last or the numbers of layers, or build a cache with --targets logits"
        )
    layers: tuple[int, ...] = ()
    if isinstance(asked, Path):
        config = load_config(asked)
    else:
        shape = student_shape(asked, teacher_config)
        if has_distribution and has_weights(teacher_folder) and kind_of(teacher_config) == "causal-lm":
            plan = plan.of_decoder(shape.layers, teacher_config.num_hidden_layers)
        layers = plan.layers_for(shape.layers, teacher_config.num_hidden_layers)
        with explain_misfits(teacher_config, str(shape)):
            config = _own_config(plan.folder, shape, teacher_config) or derive_config(teacher_config, shape, layers)
    for place in {place for place in (folder, plan.folder) if place is not None}:
        _check_kind(place, check_family(place), kind_of(teacher_config))
        _check_vocabulary(place, teacher_folder)
    with torch.device("meta"):
        with explain_misfits(config, str(spec)):
            student = _make_model(config, with_mlm_head)
        _check_positions(student, seq_len, str(spec))
        if plan.insists:
            check_takeover(student, _make_model(teacher_config, with_mlm_head), plan, layers)
        if plan.by_importance and not plan.insists:
            teacher = _make_model(teacher_config, with_mlm_head)
            if not takes_layers(student, teacher, layers):
                plan = replace(plan, mapping="uniform")
    return StudentPlan(
        config=config,
        init=plan,
        layers=layers,
        teacher_folder=teacher_folder,
        with_mlm_head=with_mlm_head,
        seq_len=seq_len,
        isolated=isolated,
    )


def build_student(
    plan: StudentPlan,
    *,
    seed: int,
    read_sample: ReadSample | None = None,
    read_targets: ReadTargets | None = None,
) -> BuiltStudent:
    """Make the student and give it its first weights.

    Args:
        plan: see `plan_student`.
        seed: of every random weight.
        read_sample: gives the rows on which a student of other sizes than the teacher's is fitted to it. Without them
            its layers stay random.
        read_targets: gives rows with cached distributions, on which layers are chosen where `plan` says so.

    Raises:
        SettingsError: the initialisation does not fit the teacher.
        StudentError: the weights of a folder cannot be loaded, or a model of this shape does not run, or lets documents
            see each other that must not.
    """
    choice = None
    if plan.init.by_importance:
        assert read_targets is not None
        plan, choice = _choose_layers(plan, read_targets())
    model = _random_model(plan.config, plan.with_mlm_head, seed)
    try_out(model, plan.seq_len)
    if plan.init.folder is not None:
        copied = copy_whole(model, plan.init.folder)
        origin = f"weights of {str(plan.init.folder)!r}"
        head = head_name(plan.config)
        if plan.with_mlm_head and head not in copied:
            origin += f", which has no {head} that fits: that one is random"
        taken = TakenOver(parts=copied, description=origin)
    else:
        taken = copy_teacher(model, plan.teacher_folder, plan.init, plan.layers, read_sample)
    if plan.isolated:
        check_isolation(model, plan.seq_len)
    return BuiltStudent(
        model=model,
        description=f"{plan.config.model_type} {shape_in_words(plan.config)}: {taken.description}"
        + (f"; layers {choice}" if choice else ""),
        copied=taken.parts,
        whole_layers=taken.whole_layers,
    )


def _own_config(folder: Path | None, shape: StudentShape, teacher: PreTrainedConfig) -> PreTrainedConfig | None:
    """That of the model whose weights the student gets, if it has the shape: under another they mean something else."""
    config = None if folder is None else load_config(folder)
    fits = config is not None and config.model_type == teacher.model_type and shape_of(config) == shape
    return config if fits else None


def _choose_layers(plan: StudentPlan, rows: RowsWithTargets) -> tuple[StudentPlan, LayerChoice | None]:
    """The plan with the layers of the teacher that these rows speak for, and settings that go with them.

    Uniform layers where no row has a distribution.

    Raises:
        SettingsError: there is none, and the layers were asked for.
    """
    if not rows.places:
        if plan.init.insists:
            raise SettingsError(
                f"--init {plan.init.text!r}: no position of the first {len(rows.batch.input_ids_BT)} rows to train on "
                "has a cached distribution, so that every layer could be missed as well; give --init teacher:uniform, "
                "or build a cache with more --positions"
            )
        return replace(plan, init=replace(plan.init, mapping="uniform")), None
    teacher = load_model(plan.teacher_folder, with_mlm_head=True).model
    device = place_for(teacher, rows.device)
    choice = choose_layers(teacher.eval().to(device), plan.config.num_hidden_layers, rows.to(device))
    config = derive_config(load_config(plan.teacher_folder), shape_of(plan.config), choice.layers)
    return replace(plan, config=config, layers=choice.layers), choice


def with_vocabulary(built: BuiltStudent, kept: KeptIds) -> BuiltStudent:
    """The same student with the kept ids alone.

    Raises:
        StudentError: its family's weights cannot be cut.
    """
    with_head = encoder_of(built.model) is not built.model
    model = trim_weights(built.model, kept, lambda config: _make_model(config, with_head))
    return replace(built, model=model)


def with_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model on the CPU like `model` that holds these weights, by every name of each; what lies there is not copied.

    `model` itself may be in the hands of an engine that has its weights cut up or rounded. Its buffers are taken over.
    """
    given = {id(weight): weight.cpu() for weight in weights.values()}
    weights = {name: given[id(weight)] for name, weight in weights.items()}
    with_head = encoder_of(model) is not model
    with torch.device("meta"):
        twin = _make_model(model.config, with_head)
    if _has_tensors_apart(twin):
        twin = _random_model(model.config, with_head, seed=0)
    kept, buffers = twin.state_dict(), {name: buffer.detach().cpu() for name, buffer in model.named_buffers()}
    twin.load_state_dict({**{name: each for name, each in buffers.items() if name in kept}, **weights}, assign=True)
    for name, buffer in buffers.items():
        if name not in kept:
            owner, _, own_name = name.rpartition(".")
            setattr(twin.get_submodule(owner), own_name, buffer)
    twin.tie_weights()
    return twin


def _has_tensors_apart(model: PreTrainedModel) -> bool:
    """Whether modules keep tensors that are neither parameters nor buffers, such as tables of positions."""
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def _random_model(config: PreTrainedConfig, with_mlm_head: bool, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _make_model(config, with_mlm_head)


def _make_model(config: PreTrainedConfig, with_mlm_head: bool) -> PreTrainedModel:
    loader, options = (with_head(config), {}) if with_mlm_head else (AutoModel, pooler_option(config))
    model: PreTrainedModel = loader.from_config(config, dtype=torch.float32, **options)
    return model


def _check_kind(folder: Path, kind: ModelKind, teacher_kind: ModelKind) -> None:
    """Refuse a student that is to learn what it does not predict."""
    if kind != teacher_kind:
        names = {"masked-lm": "a masked LM", "causal-lm": "a causal LM"}
        raise StudentError(
            f"student {str(folder)!r} is {names[kind]}, and the teacher of this cache {names[teacher_kind]}: what one "
            "predicts means nothing to the other; choose a student of the teacher's kind, or one by shape such as "
            "--student 6x768"
        )


def _check_vocabulary(folder: Path, teacher_folder: Path) -> None:
    """Refuse a student whose token ids mean something else than the teacher's."""
    kept = read_kept_ids(folder)
    if kept is not None:
        raise StudentError(
            f"student {str(folder)!r} has {len(kept):,} of its teacher's {kept.teacher_entries:,} ids: weights of "
            "others, which a training may begin with, are not there; begin with the student as it was before it was "
            f"trimmed, and give --vocabulary trim:{folder / KEPT_IDS} to train it with the same ids"
        )
    difference = vocabulary_difference(folder, teacher_folder)
    if difference is not None:
        raise StudentError(
            f"student {str(folder)!r} has {difference}: the rows of the cache are the teacher's token ids and would "
            "mean other words to it; choose a student with the teacher's vocabulary, or one by shape such as "
            "--student 6x768"
        )


def _check_positions(model: PreTrainedModel, seq_len: int, spec: str) -> None:
    positions = position_limit(model)
    if positions is not None and positions < seq_len:
        raise StudentError(
            f"student {spec!r} reads at most {positions} positions, the rows of the cache have {seq_len}: it cannot be "
            f"trained on them; choose a student of at least {seq_len} positions, or build a cache with --seq-len "
            f"{positions}"
        )
