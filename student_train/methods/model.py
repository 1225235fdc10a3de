"""The module that the engine trains: the student, its train-only projections, and one forward pass per view.

In: a batch of decoded targets. Out: the loss sums of the objective's methods. The student's encoder runs once per view
that some method reads; logits are computed at masked positions only. Dropout is off unless asked for: the hidden states
and relations to be matched are those of the network that will be deployed. The student's configuration, and so the
exported student, keeps its own dropout rates for fine-tuning.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from student_train.losses.sums import LossSum
from student_train.methods.base import StudentNeeds, StudentOutputs
from student_train.methods.objective import Objective
from teacher_cache.contract.batch import Batch, TargetBatch
from teacher_cache.contract.targets import VIEWS, View
from teacher_cache.errors import StudentError
from teacher_cache.models.attention_tap import enable_tap, record_attention
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead
from teacher_cache.models.inputs import forward_arguments


class DistillationModel(nn.Module):
    """Student and objective as one trainable module. The student's attention goes through the tap from here on."""

    def __init__(
        self,
        student: PreTrainedModel,
        objective: Objective,
        *,
        dropout: float = 0.0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        reads_logits = any(objective.needs(view).head for view in VIEWS)
        self._head = LMHead(student) if reads_logits else None
        set_dropout(student, dropout)
        if any(objective.needs(view).attention_layers for view in VIEWS):
            enable_tap(student)
        if checkpointing:
            checkpoint_activations(student)

    def forward(self, batch: Batch) -> dict[str, LossSum]:
        """The loss of every method on these rows, unweighted, as sums over this batch's positions."""
        losses: dict[str, LossSum] = self.objective(self.run_student(batch), batch)
        return losses

    def run_student(self, batch: Batch) -> dict[View, StudentOutputs]:
        """What the methods read of the student, in each view that one of them reads."""
        needs = {view: self.objective.needs(view) for view in batch}
        return {view: self._run_view(targets, needs[view]) for view, targets in batch.items() if needs[view]}

    def _run_view(self, targets: TargetBatch, needs: StudentNeeds) -> StudentOutputs:
        encoder = encoder_of(self.student)
        with record_attention(encoder, needs.attention_layers) as recorded:
            result = encoder(
                input_ids=targets.input_ids_BT.long(),
                output_hidden_states=bool(needs.hidden_layers),
                **forward_arguments(encoder, targets.real_BT(), targets.starts_BT, unpadded=targets.unpadded),
            )
        return StudentOutputs(
            hidden={layer: result.hidden_states[layer] for layer in needs.hidden_layers},
            attention=recorded.vectors,
            last_hidden_BTD=result.last_hidden_state,
            head=self._head if needs.head else None,
        )


def compile_student(model: DistillationModel) -> None:
    """Run the student's encoder through torch.compile from its next pass on, which has to be of the usual size."""
    encoder_of(model.student).compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let the model keep its layers' inputs alone and compute what is in between again in the backward pass.

    Raises:
        StudentError: the family cannot.
    """
    # newer versions of Transformers have another name for it
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        # the older, reentrant way loses the gradients of recorded attention vectors
        enable({"use_reentrant": False})
    except ValueError as error:
        raise StudentError(
            f"--activation-checkpointing: family {model.config.model_type!r} cannot compute its layers again ({error}),"
            " so that nothing would be saved; leave the flag out and give a smaller --micro-batch-size"
        ) from error


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout rate of the model's modules; configurations stay as they are.

    Families keep rates as dropout modules or as numbers handed to the attention function. Layers are left out by chance
    in none, nor are the inputs of experts shaken: the teacher's targets are those of a model that does neither.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
        for name, value in vars(module).items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if "dropout" in name:
                setattr(module, name, probability)
            elif "layerdrop" in name or "jitter" in name:
                setattr(module, name, 0.0)


def freeze_unused(model: DistillationModel, batch: Batch) -> tuple[str, ...]:
    """Freeze the parameters that the losses do not reach, found by one backward pass on `batch`; returns their names.

    Left trainable they would drift by weight decay (upper parts of the last layer, a pooler, an unused head), and
    engines that wait for every gradient would wait in vain.
    """
    # a probe is no step: methods that adapt to what they see must not see it
    adapting = model.objective.training
    model.objective.eval()
    losses: dict[str, LossSum] = model(batch)
    model.objective.train(adapting)
    weights = model.objective.weights
    torch.stack([weights[name] * loss.total for name, loss in losses.items()]).sum().backward()
    unused = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            unused.append(name)
    model.zero_grad(set_to_none=True)
    return tuple(unused)
