"""Whether a family makes a student of a shape at all: what does not fit together is told by name, before any training.

Families check their sizes in many ways, or stumble over them in the middle of a pass. One pass over one row finds out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from student_train.students.shape import shape_of
from teacher_cache.errors import DistillationError, StudentError, first_line
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments


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
    """One pass over one row of `seq_len` positions, and the masked-LM head, if there is one, on one of them.

    Raises:
        StudentError: it does not run, or does not give one vector for every token after every layer.
    """
    base, shape, training = encoder_of(model), shape_of(model.config), model.training
    wanted = (1, seq_len, shape.hidden_size)
    ids_BT = torch.arange(seq_len)[None] % model.config.vocab_size
    nn.Module.eval(model)
    with explain_misfits(model.config, str(shape)):
        arguments = forward_arguments(model, torch.ones_like(ids_BT, dtype=torch.bool))
        answer = base(input_ids=ids_BT, output_hidden_states=True, **arguments)
        states = answer.hidden_states[: shape.layers + 1]
        found = [tuple(state.shape) for state in (*states, answer.last_hidden_state)]
        if found != [wanted] * (shape.layers + 2):
            raise ValueError(f"hidden states are {found} where {wanted} is needed after each of its layers")
        if base is not model:
            LMHead(model)(answer.last_hidden_state[0, :1])
    nn.Module.train(model, training)
