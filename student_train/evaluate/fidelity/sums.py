"""The sums behind a fidelity report: one class for each measure, which adds up batches and gives its result at the end.

In: what the student computed on a batch (`StudentOutputs`) and the decoded targets of the same rows. Padding and unused
places for masked positions are left out. Memory does not depend on the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_train.data.split import RowRanges, abreast
from student_train.evaluate.fidelity.plan import HiddenPair, RelationPair
from student_train.evaluate.fidelity.records import DistributionFidelity, HiddenFidelity, RelationFidelity
from student_train.losses.distributions import SampledTargets, Targets, logits_loss, within_vocabulary
from student_train.losses.relations import heads_of, one_relation_loss
from student_train.losses.vocabulary import LOGITS_AT_A_TIME
from student_train.methods.base import StudentOutputs
from student_train.methods.od import flat_targets
from student_train.ridge import PairMoments, fit_ridge, normalised_error
from teacher_cache.contract.batch import TargetBatch
from teacher_cache.contract.streams import VECTORS


class RelationSum:
    """Relation KL of one pair of layers, summed over real positions."""

    def __init__(self, pair: RelationPair) -> None:
        self.pair = pair
        self._total = dict.fromkeys(VECTORS, 0.0)
        self._positions = 0

    def add(self, outputs: StudentOutputs, targets: TargetBatch) -> None:
        """Count the real positions of a batch."""
        pair = self.pair
        student, teacher = outputs.attention[pair.student_layer], targets.attention[pair.teacher_layer]
        for name in VECTORS:
            loss = one_relation_loss(
                name,
                student,
                teacher,
                targets.length_B,
                heads=heads_of(name, pair.heads, pair.key_value_heads),
                causal=pair.causal,
                starts_BT=targets.starts_BT,
            )
            self._total[name] += float(loss)
        self._positions += int(targets.length_B.sum())

    def result(self) -> RelationFidelity:
        """Means over heads and real positions."""
        pair = self.pair
        return RelationFidelity(
            student_layer=pair.student_layer,
            teacher_layer=pair.teacher_layer,
            heads=pair.heads,
            view=pair.view,
            key_value_heads=pair.key_value_heads,
            mask="causal" if pair.causal else None,
            **{name: total / self._positions for name, total in self._total.items()},
        )


class HiddenSum:
    """Moments of one pair of layers in three parts: two that the linear map is fitted on, and one it is measured on.

    The first half of the rows is the fit's, cut into a first and a second quarter; a half of one row is cut in its
    middle. Of several stores, each gives half of its rows.
    """

    def __init__(self, pair: HiddenPair, rows: RowRanges) -> None:
        self.pair = pair
        self._places = abreast(rows)
        self._moments: tuple[PairMoments, PairMoments, PairMoments] | None = None

    def add(self, outputs: StudentOutputs, targets: TargetBatch, first_row: int) -> None:
        """Count the ordinary positions of a batch."""
        student_BTD, teacher_BTD = outputs.hidden[self.pair.student_layer], targets.hidden[self.pair.teacher_layer]
        if self._moments is None:
            widths = student_BTD.shape[-1], teacher_BTD.shape[-1]
            first, second, third = (PairMoments(*widths, student_BTD.device) for _ in range(3))
            self._moments = first, second, third
        part_BT = self._part_BT(targets, first_row)
        for part, moments in enumerate(self._moments):
            moments.add(student_BTD[part_BT == part], teacher_BTD[part_BT == part])

    def _part_BT(self, targets: TargetBatch, first_row: int) -> Tensor:
        """0 and 1 where the map is fitted, 2 where it is measured, -1 at padding and at sinks."""
        real_BT, half = targets.real_BT(), len(self._places) // 2
        places = [self._places[row] for row in range(first_row, first_row + len(real_BT))]
        row_B1 = torch.tensor(places, device=real_BT.device)[:, None]
        if half > 1:
            second_BT = (row_B1 >= half // 2).expand_as(real_BT)
        else:
            second_BT = real_BT.cumsum(1) > targets.length_B[:, None] // 2
        part_BT = torch.where(row_B1 < half, second_BT.long(), 2)
        return part_BT.masked_fill(~targets.ordinary_BT(self.pair.teacher_layer), -1)

    def result(self) -> HiddenFidelity:
        """The error of the map fitted on the first half, on the second half."""
        assert self._moments is not None
        first, second, measured_on = (moments.statistics() for moments in self._moments)
        linear = fit_ridge(first, second)
        pair = self.pair
        return HiddenFidelity(
            student_layer=pair.student_layer,
            teacher_layer=pair.teacher_layer,
            view=pair.view,
            nmse=normalised_error(linear, measured_on),
            ridge=linear.strength,
        )


class DistributionSum:
    """KL and agreement of the most probable entry, or the one most often drawn, at masked positions."""

    def __init__(self, vocab_size: int, temperature: float, kept_ids_K: Tensor | None = None) -> None:
        """`kept_ids_K` are the teacher's ids that the student has, where it has only some."""
        self._vocab_size, self._temperature, self._kept_ids_K = vocab_size, temperature, kept_ids_K
        self._kl, self._agreed, self._positions = 0.0, 0, 0

    def add(self, outputs: StudentOutputs, targets: TargetBatch) -> None:
        """Count the places of a batch, never more than `LOGITS_AT_A_TIME` logits at once."""
        assert outputs.head is not None and targets.places is not None
        hidden_PD = outputs.at_places(targets.places)
        # a causal student may have its vocabulary padded to fewer entries than its teacher's
        taught = within_vocabulary(flat_targets(targets), self._vocab_size)
        place_P = taught.real_P.nonzero()[:, 0]
        run = max(1, LOGITS_AT_A_TIME // self._vocab_size)
        for places in place_P.split(run):
            self._count(outputs.head(hidden_PD[places]), type(taught)(*(part[places] for part in taught)))

    def add_exact(self, outputs: StudentOutputs, teacher: StudentOutputs, targets: TargetBatch) -> None:
        """Count the places of a batch against what the teacher says itself, in runs of positions as `add`.

        Where the two have vocabularies of other sizes, their distributions over the ids that both have are compared.
        """
        assert outputs.head is not None and teacher.head is not None and targets.places is not None
        student_PD, teacher_PD = outputs.at_places(targets.places), teacher.at_places(targets.places)
        place_P = targets.places.real_BM().flatten().nonzero()[:, 0]
        for places in place_P.split(max(1, LOGITS_AT_A_TIME // self._vocab_size)):
            logits_PV = outputs.head(student_PD[places])
            taught_PV = teacher.head(teacher_PD[places]).to(logits_PV.device)
            if self._kept_ids_K is not None:
                taught_PV = taught_PV[:, self._kept_ids_K.to(taught_PV.device)]
            both = min(logits_PV.shape[1], taught_PV.shape[1])
            log_q_PV, log_p_PV = (
                (each_PV[:, :both].float() / self._temperature).log_softmax(dim=1) for each_PV in (logits_PV, taught_PV)
            )
            self._kl += float((log_p_PV.exp() * (log_p_PV - log_q_PV)).sum())
            self._agreed += int((log_q_PV.argmax(1) == log_p_PV.argmax(1)).sum())
            self._positions += len(places)

    def _count(self, logits_PV: Tensor, targets: Targets) -> None:
        loss = logits_loss(logits_PV, targets, temperature=self._temperature)
        # the loss is scaled by tau^2 to keep its gradient's size; the divergence itself is not
        self._kl += float(loss) / self._temperature**2
        self._agreed += int((logits_PV.argmax(1) == _most_probable(targets)).sum())
        self._positions += len(logits_PV)

    def result(self) -> DistributionFidelity | None:
        """Means over masked positions; None where there was none, as nothing would look like a perfect student."""
        if not self._positions:
            return None
        return DistributionFidelity(
            kl=self._kl / self._positions,
            top1_agreement=self._agreed / self._positions,
            positions=self._positions,
            temperature=self._temperature,
        )


def _most_probable(targets: Targets) -> Tensor:
    """The teacher's first choice at each position, as far as the cache knows it and the student has it [P]."""
    if isinstance(targets, SampledTargets):
        return targets.ids_PK.long().gather(1, targets.counts_PK.argmax(1, keepdim=True)).squeeze(1)
    first_P1 = (targets.ids_PK >= 0).int().argmax(1, keepdim=True)
    return targets.ids_PK.long().gather(1, first_P1).squeeze(1)
