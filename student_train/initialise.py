"""First weights of a student: what it takes over from the teacher, or from another model of the same shape.

In: a freshly made student and the folder that the weights come from. Out: the student's parameters overwritten in
place, the list of what was copied, and one line that says so. Works on parameter names relative to three places that
every encoder has: the list of layers, the rest of the base model (embeddings, a final norm), and the masked-LM head
around it. Only whole parts are copied: a layer cut down to another width is not a layer. Costs one load of the source
model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from student_train.pretrained import encoder_of, load_model
from student_train.shape import shape_of
from teacher_cache.errors import SettingsError, StudentError
from teacher_cache.layers import uniform_layers

_NAMED = ("auto", "random", "embeddings")


@dataclass(frozen=True, kw_only=True)
class InitPlan:
    """What `--init` asks for. `layers` are those of `teacher:LAYERS`, `folder` is where whole models come from."""

    text: str
    kind: Literal["auto", "random", "embeddings", "teacher", "folder"]
    layers: tuple[int, ...] = ()
    folder: Path | None = None

    def layers_for(self, student_layers: int, teacher_layers: int) -> tuple[int, ...]:
        """The teacher layer that stands behind each student layer.

        Raises:
            SettingsError: `teacher:LAYERS` names another number of layers than the student has.
        """
        if self.kind != "teacher":
            return uniform_layers(teacher_layers, student_layers)
        if len(self.layers) != student_layers:
            raise SettingsError(
                f"--init {self.text!r} names {len(self.layers)} teacher layers for a student of {student_layers}: "
                "every student layer needs one; name as many as the student has"
            )
        return self.layers


def parse_init(text: str, *, from_folder: Path | None, teacher_layers: int) -> InitPlan:
    """Read `--init`; `from_folder` is the folder of a student that is not given by shape.

    Raises:
        SettingsError: the text cannot be read, names a layer that does not exist, or contradicts `--student FOLDER`.
    """
    folder = Path(text).expanduser()
    if text not in ("", *_NAMED) and folder.is_dir():
        return InitPlan(text=text, kind="folder", folder=folder)
    if from_folder is not None:
        if text != "auto":
            raise SettingsError(
                f"--init {text!r} with a student from folder {str(from_folder)!r}: the student has its own weights and "
                "would lose them; leave --init out, or give the student by shape such as --student 6x768"
            )
        return InitPlan(text=text, kind="folder", folder=from_folder)
    if text in _NAMED:
        return InitPlan(text=text, kind=text)  # type: ignore[arg-type]
    name, _, numbers = text.partition(":")
    if name != "teacher" or not all(number.isdecimal() for number in numbers.split(",")):
        raise SettingsError(
            f"--init {text!r} cannot be read, and there is no such folder: give auto, random, embeddings, "
            "teacher:LAYERS such as teacher:2,4,6, or a Hugging Face folder"
        )
    layers = tuple(int(number) for number in numbers.split(","))
    beyond = [layer for layer in layers if not 1 <= layer <= teacher_layers]
    if beyond:
        raise SettingsError(
            f"--init {text!r} names layer {beyond[0]}, the teacher has layers 1 to {teacher_layers}: there is nothing "
            "to copy; name layers that exist"
        )
    return InitPlan(text=text, kind="teacher", layers=layers)


def copy_teacher(
    student: PreTrainedModel, teacher_folder: Path, plan: InitPlan, layers: tuple[int, ...]
) -> tuple[tuple[str, ...], str]:
    """Copy what `plan` asks for; returns the parts copied and one line for people.

    `auto` copies what fits: embeddings, `layers`, the masked-LM head. `embeddings` and `teacher:LAYERS` insist.

    Raises:
        SettingsError: the plan insists on parts whose sizes differ.
    """
    if plan.kind == "random":
        return (), "random weights"
    loaded = load_model(teacher_folder, with_mlm_head=encoder_of(student) is not student)
    teacher = loaded.model
    differing = _differing_sizes(student, teacher)
    copied: list[str] = []
    if _copy_embeddings(student, teacher):
        copied.append("embeddings")
    elif plan.kind == "embeddings":
        raise _does_not_fit(plan, "embeddings", differing)
    if differing and plan.kind == "teacher":
        raise _does_not_fit(plan, "layers", differing)
    if plan.kind != "embeddings":
        if not differing:
            copied.extend(_copy_layers(student, teacher, layers))
        if loaded.has_trained_head and _copy_head(student, teacher):
            copied.append("masked-LM head")
    return tuple(copied), _describe(copied, layers, differing if plan.kind == "auto" else "")


def copy_whole(student: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    """Copy every parameter of the model in `folder`, which must have the student's family and shape.

    Where the folder has no masked-LM head and the student needs one, the head keeps its random weights.

    Raises:
        StudentError: it cannot be loaded, or differs in a parameter's name or size.
    """
    loaded = load_model(folder, with_mlm_head=encoder_of(student) is not student)
    source = loaded.model
    if not _copy_all(_parameters(encoder_of(student)), _parameters(encoder_of(source))):
        raise StudentError(
            f"the model in {str(folder)!r} ({source.config.model_type} {shape_of(source.config)}) has other parameters "
            f"than the student ({student.config.model_type} {shape_of(student.config)}): its weights do not fit; give "
            "a folder of the same family and shape, or use --student with that folder"
        )
    if loaded.has_trained_head and _copy_head(student, source):
        return ("base model", "masked-LM head")
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


Parameters = dict[str, nn.Parameter]


def _parameters(module: nn.Module) -> Parameters:
    """Parameters by name, each once, without those of a pooler."""
    return {name: parameter for name, parameter in module.named_parameters() if not name.startswith("pooler.")}


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


def _copy_embeddings(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    words = [model.get_input_embeddings().weight.shape for model in (student, teacher)]
    if words[0] != words[1]:
        return False
    # not all or nothing: with factorised embeddings the map to the hidden width may differ, the embeddings do not
    _copy_fitting(_around_layers(student), _around_layers(teacher))
    return True


def _copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> list[str]:
    (_, targets), (_, sources) = find_layers(encoder_of(student)), find_layers(encoder_of(teacher))
    for target, layer in zip(targets, layers, strict=True):
        # ModernBERT's first layer has no norm of its own; a layer that moves there leaves its norm behind
        _copy_fitting(dict(target.named_parameters()), dict(sources[layer - 1].named_parameters()))
    return [f"layer {number} from teacher layer {layer}" for number, layer in enumerate(layers, start=1)]


def _copy_head(student: PreTrainedModel, teacher: PreTrainedModel) -> bool:
    return _copy_all(_head(student), _head(teacher))


def _differing_sizes(student: PreTrainedModel, teacher: PreTrainedModel) -> str:
    """Sizes of a layer in which the two differ, in words; empty where teacher layers fit the student."""
    ours, theirs = shape_of(student.config), shape_of(teacher.config)
    sizes = {"width": "hidden_size", "heads": "heads", "feed-forward width": "intermediate_size"}
    return ", ".join(
        f"{name} {getattr(ours, size)} (teacher: {getattr(theirs, size)})"
        for name, size in sizes.items()
        if getattr(ours, size) != getattr(theirs, size)
    )


def _does_not_fit(plan: InitPlan, part: str, differing: str) -> SettingsError:
    return SettingsError(
        f"--init {plan.text!r}: the student has {differing}, so the teacher's {part} do not fit it; give the student "
        "the teacher's sizes, or use --init auto, which copies what fits"
    )


def _describe(copied: list[str], layers: tuple[int, ...], differing: str) -> str:
    parts = [part for part in copied if not part.startswith("layer ")]
    if len(parts) < len(copied):
        parts.append("layers " + ", ".join(map(str, layers)))
    text = f"{', '.join(parts)} copied from the teacher" if parts else "random weights"
    return f"{text}; layers do not fit: {differing}" if differing else text
