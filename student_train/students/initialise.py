"""First weights of a student: what it takes over from the teacher, or from another model of the same shape.

In: a freshly made student and the folder that the weights come from. Out: the student's parameters overwritten in
place, the list of what was copied, and one line that says so. Works on parameter names relative to three places that
every model has: the list of layers, the rest of the base model (embeddings, a final norm), and the head over the
vocabulary around it. Where the sizes are the teacher's, parts are copied whole, bit for bit. Layers of other sizes are
not copied: families that `narrowing` knows are sliced, all others keep the layers random and say so. Costs one load of
the source model, and for slicing what `narrowing.narrow` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from student_train.init_plan import InitPlan
from student_train.students.narrowing.sample import TokenSample
from student_train.students.narrowing.slicing import find_obstacle, slice_student
from student_train.students.pretrained import LoadedModel, causal, has_weights, head_name, load_model, place_for
from student_train.students.shape import shape_in_words, shape_of
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.models.families import encoder_of

ReadSample = Callable[[], TokenSample]
"""Reads the rows that a student of other sizes is fitted on; called only where one is."""


Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class TakenOver:
    """The parts that a student took over from its teacher, in one line too; `whole_layers`: its layers, bit for bit."""

    parts: tuple[str, ...]
    description: str
    whole_layers: bool = False


def copy_teacher(
    student: PreTrainedModel,
    teacher_folder: Path,
    plan: InitPlan,
    layers: tuple[int, ...],
    read_sample: ReadSample | None = None,
) -> TakenOver:
    """Do what `plan` asks for.

    Where the sizes differ, `auto` and `teacher:LAYERS` slice everything. Where that cannot be, `auto` copies what fits
    (embeddings, the head), and `teacher:LAYERS` is refused. `embeddings` insists on a copy.

    Raises:
        SettingsError: the plan insists on parts whose sizes differ.
    """
    if plan.kind == "random":
        return TakenOver(parts=(), description="random weights")
    if plan.kind == "auto" and not has_weights(teacher_folder):
        return TakenOver(
            parts=(), description="random weights: the targets were imported, and no weights of the teacher with them"
        )
    loaded = load_model(teacher_folder, with_mlm_head=encoder_of(student) is not student)
    teacher = loaded.model
    if plan.insists:
        check_takeover(student, teacher, plan, layers, has_rows=read_sample is not None)
    differing = _differing_sizes(student, teacher, layers)
    if differing and plan.kind != "embeddings":
        obstacle = _obstacle(student, teacher, has_rows=read_sample is not None)
        if obstacle is None and read_sample is not None:
            return _slice(student, loaded, layers, read_sample())
        differing = f"{differing}, and {obstacle}"
    copied: list[str] = []
    whole_layers = plan.kind != "embeddings" and not differing
    same_words = _copy_embeddings(student, teacher)
    if same_words:
        copied.append("embeddings")
    if plan.kind != "embeddings":
        if whole_layers:
            copied.extend(_copy_layers(student, teacher, layers))
        # a head that is nothing but the embeddings came with them, or did not
        if loaded.has_trained_head and (same_words or _head(student)) and _copy_head(student, teacher):
            copied.append(head_name(student.config))
    misfits = "layers" if same_words or not causal(student.config) else "embeddings and layers"
    reason = f"{misfits} do not fit: {differing}" if differing and plan.kind == "auto" else ""
    description = _describe(copied, layers, reason)
    return TakenOver(parts=tuple(copied), description=description, whole_layers=whole_layers)


def check_takeover(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: InitPlan,
    layers: tuple[int, ...],
    *,
    has_rows: bool = True,
) -> None:
    """Refuse a plan that insists on parts of the teacher whose sizes differ. Looks at sizes, not at weights.

    `layers` are the teacher layers behind the student's, `has_rows` says whether there are rows to fit a student of
    other sizes on.

    Raises:
        SettingsError: it does.
    """
    differing = _differing_sizes(student, teacher, layers)
    if plan.kind == "embeddings" and not _same_words(student, teacher):
        raise _does_not_fit(plan, "embeddings", differing)
    if plan.kind == "teacher" and differing:
        obstacle = _obstacle(student, teacher, has_rows=has_rows)
        if obstacle is not None:
            raise _does_not_fit(plan, "layers", f"{differing}, and {obstacle}")


def takes_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> bool:
    """Whether layers of the teacher can be copied or, given rows, sliced. Looks at sizes, not at weights."""
    return not _differing_sizes(student, teacher, layers) or _obstacle(student, teacher, has_rows=True) is None


def copy_whole(student: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Copy every parameter of the model in `folder`, which must have the student's family and shape.

    Where the folder has no head over the vocabulary and the student needs one, the head keeps its random weights.

    Raises:
        StudentError: it cannot be loaded, or differs in a parameter's name or size.
    """
    loaded = load_model(folder, with_mlm_head=encoder_of(student) is not student)
    source = loaded.model
    if not _copy_all(_parameters(encoder_of(student)), _parameters(encoder_of(source))):
        raise StudentError(
            f"the model in {str(folder)!r} ({source.config.model_type} {shape_in_words(source.config)}) has other "
            f"parameters than the student ({student.config.model_type} {shape_in_words(student.config)}): its weights "
            "do not fit; give a folder of the same family and shape, or use --student with that folder"
        )
    _copy_fitting(_kept_buffers(encoder_of(student)), _kept_buffers(encoder_of(source)))
    if loaded.has_trained_head and _copy_head(student, source):
        return ("base model", head_name(student.config))
    return ("base model",)


def find_layers(base: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the encoder layers of a base model.

    Raises:
        StudentError: the family keeps no list of as many modules as it has layers.
    """
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == base.config.num_hidden_layers:
            return name, module
    raise StudentError(
        f"family {base.config.model_type!r} keeps no list of {base.config.num_hidden_layers} layers: "
        "layers cannot be copied one by one; use --init random, or a Hugging Face folder as --student"
    )


def _parameters(module: nn.Module) -> Parameters:
    """Parameters by name, each once, without those of a pooler."""
    return {name: parameter for name, parameter in module.named_parameters() if not name.startswith("pooler.")}


def _kept_buffers(module: nn.Module) -> Parameters:
    """Buffers that are saved with the model, by name."""
    kept = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _around_layers(model: PreTrainedModel) -> Parameters:
    """What the base model has beside its layers: embeddings, and in some families a projection or a final norm."""
    base = encoder_of(model)
    layers, _ = find_layers(base)
    return {name: value for name, value in _parameters(base).items() if not name.startswith(layers + ".")}


def _head(model: PreTrainedModel) -> Parameters:
    """What a masked language model has beside its base model; a decoder tied to the embeddings belongs to those."""
    base = {id(parameter) for parameter in encoder_of(model).parameters()}
    return {name: value for name, value in model.named_parameters() if id(value) not in base}


@torch.no_grad()
def _copy_fitting(target: Parameters, source: Parameters) -> None:
    """Copy the parameters that both have in the same size."""
    for name, parameter in target.items():
        if name in source and source[name].shape == parameter.shape:
            parameter.copy_(source[name])


def _copy_all(target: Parameters, source: Parameters) -> bool:
    """Copy everything if both have the same parameters in the same sizes; else nothing."""
    fits = target.keys() == source.keys() and all(target[name].shape == source[name].shape for name in target)
    if fits:
        _copy_fitting(target, source)
    return fits


def _same_words(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    """Whether both have word embeddings of one size."""
    shapes = {model.get_input_embeddings().weight.shape for model in (student, teacher)}
    return len(shapes) == 1


def _copy_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    if not _same_words(student, teacher):
        return False
    # not all or nothing: with factorised embeddings the map to the hidden width may differ, the embeddings do not
    _copy_fitting(_around_layers(student), _around_layers(teacher))
    return True


def _copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> list[str]:
    (_, targets), (_, sources) = find_layers(encoder_of(student)), find_layers(encoder_of(teacher))
    for target, layer in zip(targets, layers, strict=True):
        # ModernBERT's first layer has no norm of its own; a layer that moves there leaves its norm behind
        _copy_fitting(dict(target.named_parameters()), dict(sources[layer - 1].named_parameters()))
        # routers of experts keep what balances them beside their parameters
        _copy_fitting(_kept_buffers(target), _kept_buffers(sources[layer - 1]))
    return _layer_names(layers)


def _layer_names(layers: tuple[int, ...]) -> list[str]:
    return [f"layer {number} from teacher layer {layer}" for number, layer in enumerate(layers, start=1)]


def _copy_head(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    return _copy_all(_head(student), _head(teacher))


def _obstacle(student: PreTrainedModel, teacher: PreTrainedModel, *, has_rows: bool) -> str | None:
    """Why layers of other sizes cannot be sliced from the teacher's; None if they can."""
    found = find_obstacle(student, teacher)
    return found if found or has_rows else "there are no rows to fit sliced ones on"


def _slice(student: PreTrainedModel, loaded: LoadedModel, layers: tuple[int, ...], sample: TokenSample) -> TakenOver:
    device, training = place_for(loaded.model, sample.input_ids_BT.device), student.training
    sample = sample.to(device)
    student.eval().to(device)
    loaded.model.eval().to(device)
    narrowing = slice_student(student, loaded.model, layers, sample, with_head=loaded.has_trained_head)
    student.cpu().train(training)
    parts = ["embeddings", *_layer_names(layers), *([head_name(student.config)] if loaded.has_trained_head else [])]
    named = _name_parts(parts, layers)
    return TakenOver(
        parts=tuple(f"{part}, sliced" for part in parts),
        description=f"{named} sliced from the teacher: {narrowing}",
    )


def _differing_sizes(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> str:
    """In what layers of the two differ, in words; empty where the teacher's `layers` fit the student."""
    ours, theirs = shape_of(student.config), shape_of(teacher.config)
    sizes = {"width": "hidden_size", "heads": "heads", "feed-forward width": "intermediate_size"}
    pairs = {name: (getattr(ours, size), getattr(theirs, size)) for name, size in sizes.items()}
    if ours.key_value_heads or theirs.key_value_heads:
        pairs["key/value heads"] = (ours.key_value_heads or ours.heads, theirs.key_value_heads or theirs.heads)
    differing = ", ".join(f"{name} {one} (teacher: {other})" for name, (one, other) in pairs.items() if one != other)
    return differing or _differing_layers(student, teacher, layers)


def _differing_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> str:
    """The first matrix of the student's layers that the teacher's have not got: families mix layers of several kinds.

    Vectors do not count. ModernBERT's first layer has no norm of its own, and one that moves there leaves it behind.
    """
    if not layers:
        return ""
    (_, targets), (_, sources) = find_layers(encoder_of(student)), find_layers(encoder_of(teacher))
    for number, (target, layer) in enumerate(zip(targets, layers, strict=True), start=1):
        given = {name: value.shape for name, value in sources[layer - 1].named_parameters()}
        for name, value in target.named_parameters():
            if value.ndim > 1 and given.get(name) != value.shape:
                found = tuple(given[name]) if name in given else "none"
                return f"{name!r} of layer {number} {tuple(value.shape)} (teacher layer {layer}: {found})"
    return ""


def _does_not_fit(plan: InitPlan, part: str, differing: str) -> SettingsError:
    return SettingsError(
        f"--init {plan.text!r}: the student has {differing}, so the teacher's {part} do not fit it; give the student "
        "the teacher's sizes, or use --init auto, which takes over what it can"
    )


def _describe(copied: list[str], layers: tuple[int, ...], reason: str) -> str:
    text = f"{_name_parts(copied, layers)} copied from the teacher" if copied else "random weights"
    return f"{text}; {reason}" if reason else text


def _name_parts(copied: list[str], layers: tuple[int, ...]) -> str:
    parts = [part for part in copied if not part.startswith("layer ")]
    if len(parts) < len(copied):
        parts.append("layers " + ", ".join(map(str, layers)))
    return ", ".join(parts)
