"""Whether a family makes a student of a shape at all: what does not fit together is told by name, before any training.

Families check their sizes in many ways, or stumble over them in the middle of a pass. One pass over one row finds out.
Two things it does not show: rotary positions on an odd number of components, where some sizes run and compute something
else, and documents that share a row and see each other. Both are looked for by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from student_train.students.shape import head_width, shape_in_words
from teacher_cache.errors import DistillationError, StudentError, first_line
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments
from teacher_cache.models.isolation import measure_isolation


@contextmanager
def explain_misfits(config: PreTrainedConfig, shape: str) -> Iterator[None]:
    """Whatever a family's own code raises inside becomes a `StudentError` that names the family and the shape."""
    try:
        yield
    except DistillationError:
        raise
    except Exception as error:
        raise StudentError(
            f"family {config.model_type!r} gives no student {shape} that runs ({type(error).__name__}: "
            f"{first_line(error)}): some of its sizes do not follow from layers, width and heads; give a shape of the "
            "teacher's width and heads, or as --student the folder of a model that has the teacher's vocabulary"
        ) from error


@torch.no_grad()
def try_out(model: PreTrainedModel, seq_len: int) -> None:
    """One pass over one row of `seq_len` positions, and the head over the vocabulary, if there is one, on one of them.

    Raises:
        StudentError: it does not run, or does not give one vector for every token after every layer.
    """
    base, layers, training = encoder_of(model), model.config.num_hidden_layers, model.training
    wanted = (1, seq_len, model.config.hidden_size)
    ids_BT = torch.arange(seq_len)[None] % model.config.vocab_size
    nn.Module.eval(model)
    with explain_misfits(model.config, shape_in_words(model.config)):
        _check_rotary(base)
        arguments = forward_arguments(model, torch.ones_like(ids_BT, dtype=torch.bool))
        answer = base(input_ids=ids_BT, output_hidden_states=True, **arguments)
        states = answer.hidden_states[: layers + 1]
        found = [tuple(state.shape) for state in (*states, answer.last_hidden_state)]
        if found != [wanted] * (layers + 2):
            raise ValueError(f"hidden states are {found} where {wanted} is needed after each of its layers")
        if base is not model:
            LMHead(model)(answer.last_hidden_state[0, :1])
    nn.Module.train(model, training)


def check_isolation(model: PreTrainedModel, seq_len: int) -> None:
    """Refuse a student that cannot read rows whose documents do not see each other.

    Raises:
        StudentError: it cannot be told where documents begin, or they see each other all the same.
    """
    training, found = model.training, ""
    nn.Module.eval(model)
    try:
        report = measure_isolation(model, seq_len, with_head=False)
        found = "" if report.isolated else f"in one row they see each other: {report}"
    except ValueError as error:
        found = str(error)
    nn.Module.train(model, training)
    if found:
        raise StudentError(
            f"a student of family {model.config.model_type!r} does not keep apart the documents of a row, as the "
            f"teacher of this cache did ({found}): it would learn from what its teacher never saw; choose a student of "
            "the teacher's family, or build a cache with --segments joined"
        )


def _check_rotary(base: PreTrainedModel) -> None:
    """Rotary positions turn components in pairs; some families run on an odd number of them, and widen the heads."""
    if not any(name.rpartition(".")[2].endswith("inv_freq") for name, _ in base.named_buffers()):
        return
    width, settings = head_width(base.config), getattr(base.config, "rope_parameters", None) or {}
    # some families have settings for each kind of layer
    each = settings.values() if all(isinstance(value, dict) for value in settings.values()) else [settings]
    for share in {kind.get("partial_rotary_factor") or 1.0 for kind in each} or {1.0}:
        if int(width * share) % 2:
            turned = f"{int(width * share)} of " if share != 1 else ""
            raise ValueError(f"rotary positions turn pairs, and its heads have {turned}{width} components to turn")
