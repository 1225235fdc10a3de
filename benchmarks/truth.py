"""The values that `layout.py` hands to every format, to compare with what it gives back; a difference ends the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from formats import IDS, Format, Samples
from recorded import RecordedTeacher

from teacher_cache.codecs.fixed import make_codec
from teacher_cache.contract.targets import nmse_target
from teacher_cache.corpus.corpus import Rows

_SLACK = 1.1
"""How far the NMSE of a store may be above the one asked for: calibration has seen a sample only."""


class Truth:
    """Rows, and what the teacher gave for them. Only real positions count."""

    def __init__(self, recorded: RecordedTeacher, rows: Rows) -> None:
        self.hidden = recorded.hidden
        self.values = sum(values_BTD.numel() for values_BTD in self.hidden.values())
        part = rows.read(0, len(rows))
        self.ids_BT = torch.from_numpy(part.input_ids_BT)
        self.real_BT = torch.arange(self.ids_BT.shape[1]) < torch.from_numpy(part.length_B)[:, None]
        # a look at every value also brings the whole recording into memory, for the first format as for the last
        self._deviation = {layer: self._squared_deviation(values_BTD) for layer, values_BTD in self.hidden.items()}

    def samples(self, first: int, last: int) -> Samples:
        """Rows first..last, without a copy."""
        hidden = {f"hidden.{layer}": values_BTD[first:last] for layer, values_BTD in self.hidden.items()}
        return {IDS: self.ids_BT[first:last], **hidden}

    def check(self, one: Format, given: Iterable[tuple[Sequence[int], Samples]]) -> float:
        """Compare everything that a format gives, by row numbers; returns the NMSE of the worst layer."""
        errors = dict.fromkeys(self.hidden, 0.0)
        for rows, samples in given:
            which = list(rows)
            if not torch.equal(samples[IDS], self.ids_BT[which].long()):
                raise SystemExit(f"{one.name}: rows {which[0]}, … came back with other token ids")
            for layer, values_BTD in self.hidden.items():
                want_ND = values_BTD[which][self.real_BT[which]]
                have_ND = samples[f"hidden.{layer}"][self.real_BT[which]]
                if not _within_bound(one.precision, have_ND, want_ND):
                    raise SystemExit(
                        f"{one.name}: hidden state {layer} of rows {which[0]}, … came back with other values"
                    )
                errors[layer] += float((have_ND - want_ND).double().square().sum())
        nmse = max(error / self._deviation[layer] for layer, error in errors.items())
        declared = nmse_target(one.precision)
        if declared is not None and not nmse <= declared * _SLACK:
            raise SystemExit(f"{one.name}: NMSE {nmse:.3g} is above what it declares, {declared:g}")
        return nmse

    def _squared_deviation(self, values_BTD: torch.Tensor) -> float:
        """Sum of squared distances from the mean, a row at a time."""
        rows = list(zip(values_BTD, self.real_BT, strict=True))
        mean_D = torch.stack([row_TD[real_T].double().sum(dim=0) for row_TD, real_T in rows]).sum(dim=0)
        mean_D /= int(self.real_BT.sum())
        return sum(float((row_TD[real_T] - mean_D).square().sum()) for row_TD, real_T in rows)


def _within_bound(precision: str, have_ND: torch.Tensor, want_ND: torch.Tensor) -> bool:
    """Whether each value is what this precision makes of it; `nmse` promises something for all of them together."""
    if precision == "float16":
        return torch.equal(have_ND, want_ND.half().float())
    if nmse_target(precision) is not None:
        return True
    return bool(((have_ND - want_ND).abs() <= make_codec(precision).error_bound_ND(want_ND)).all())
