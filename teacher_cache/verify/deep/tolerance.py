"""How far decoded targets are from what the teacher gives now, and whether that is within what the store declares.

A comparison has three sides: what is stored, what the teacher gives for the same rows together (`live`), and what it
gives for each row alone (`alone`). The distance of the last two is the noise floor: arithmetic differs with the shape
of a batch, and no codec can be closer to a teacher than the teacher is to itself. Limits are the declared error, four
times the noise, and what arithmetic in the teacher's precision may differ between two machines.

Where the declared error is an average (`nmse`), few rows have one of their own, mostly because their variance differs:
of 400 random choices from 96 rows of 128 tokens, single rows had 0.5 to 1.9 times the declared NMSE, 16 together 0.86
to 1.25 times (last layer of a BERT of 6 layers; 0.96 to 1.03 elsewhere). From 16 rows on, four standard errors are
allowed (of a ratio: Cochran, Sampling Techniques, 6.4), before that as much again, and a tenth for the calibration,
which was a sample too: no false alarm in those choices. Wrong targets are far outside: those of other rows, or in
another rotation, have an NMSE of about 2. One wrong token shows, too: the worst right one had 1.2 times the average.

Sinks, which a store keeps apart, count in none of these sums: each is held to its own bound, in length.

Shapes: N tokens of one row, D components. All tensor functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NOISE = 4.0
_ROUNDINGS = 16.0
"""How many roundings of the largest number two correct implementations of a teacher may be apart."""
_STANDARD_ERRORS = 4.0
_CALIBRATION = 0.1
_WORST_TOKEN = 8.0
"""How often the average declared error a single token may have. In codecs with bounds, large tokens have large ones."""
_ENOUGH_ROWS = 16
_FEW_ROWS = 1.0
"""Share of the declared error that is allowed beyond it where there are too few rows to tell a standard error."""


@dataclass(frozen=True, kw_only=True)
class TargetCheck:
    """One line of the result: what is stored is off by `stored`, may be by `declared`; the teacher itself by `noise`.

    `problem` says what is wrong, empty if nothing is.
    """

    target: str
    measure: str
    stored: float
    declared: float
    noise: float
    problem: str = ""


def rounding_unit(dtype: str) -> float:
    """The relative error of one rounding in this arithmetic."""
    return float(torch.finfo(getattr(torch, dtype)).eps) / 2


def arithmetic(noise: torch.Tensor, scale: float, dtype: str) -> float:
    """How far numbers of this magnitude may be apart for arithmetic alone, the noise seen between two runs included."""
    return _NOISE * _largest(noise) + _ROUNDINGS * rounding_unit(dtype) * scale


@dataclass(frozen=True)
class _RowSums:
    """Squared errors of one row, summed; first and second moments of what the teacher gives."""

    error: float
    noise: float
    expected: float
    worst: float
    square: float
    sum_D: torch.Tensor
    count: int

    def variance(self, mean_D: torch.Tensor) -> float:
        """Squared distances of the tokens from a mean, summed."""
        return self.square - 2 * float(self.sum_D @ mean_D) + self.count * float(mean_D.square().sum())


class VectorErrors:
    """Errors of vectors, row by row. `declared` is their NMSE; None where each value, or each row, has its own."""

    def __init__(self, target: str, declared: float | None, dtype: str) -> None:
        self.target = target
        self.declared = declared
        self.dtype = dtype
        self.rows: list[_RowSums] = []
        self.beyond = 0
        self.beyond_sinks = 0

    def add_sinks(
        self, have_SD: torch.Tensor, live_SD: torch.Tensor, alone_SD: torch.Tensor, bound_SD: torch.Tensor
    ) -> None:
        """Add the sinks of one row: how far each may be off is the length of its bound."""
        if not len(have_SD):
            return
        error_S, noise_S = ((one.double() - live_SD.double()).norm(dim=1) for one in (have_SD, alone_SD))
        allowed = arithmetic(noise_S, float(live_SD.double().norm(dim=1).amax()), self.dtype)
        self.beyond_sinks += int((~(error_S <= bound_SD.double().norm(dim=1) + allowed)).sum())

    def add(
        self,
        have_ND: torch.Tensor,
        live_ND: torch.Tensor,
        alone_ND: torch.Tensor,
        *,
        bound_ND: torch.Tensor | None = None,
        expected: float = 0.0,
    ) -> None:
        """Add the real positions of one row.

        `bound_ND` is the largest distance of each value; `expected` the squared error that is expected of the row.
        """
        if not len(have_ND):
            return
        have_ND, live_ND, alone_ND = have_ND.double(), live_ND.double(), alone_ND.double()
        error_ND, noise_ND = have_ND - live_ND, alone_ND - live_ND
        if bound_ND is not None:
            expected = float(bound_ND.double().square().sum())
            allowed = arithmetic(noise_ND.abs(), float(live_ND.abs().amax()), self.dtype)
            self.beyond += int((~(error_ND.abs() <= bound_ND.double() + allowed)).sum())
        error_N = error_ND.square().sum(dim=1)
        self.rows.append(
            _RowSums(
                error=float(error_N.sum()),
                noise=float(noise_ND.square().sum()),
                expected=expected,
                worst=float(error_N.amax()),
                square=float(live_ND.square().sum()),
                sum_D=live_ND.sum(dim=0),
                count=len(live_ND),
            )
        )

    def result(self, scale: float = 1.0) -> TargetCheck:
        """NMSE over all rows, and the verdict; `scale` is that of the errors expected of the rows."""
        if not self.rows:
            problem = self._sinks_problem() or "none of the tokens compared is an ordinary one"
            return TargetCheck(target=self.target, measure="NMSE", stored=0, declared=0, noise=0, problem=problem)
        tokens = sum(row.count for row in self.rows)
        mean_D = torch.stack([row.sum_D for row in self.rows]).sum(dim=0) / tokens
        variances = [row.variance(mean_D) for row in self.rows]
        variance = max(sum(variances), torch.finfo(torch.float64).tiny)
        stored, noise = (sum(getattr(row, name) for row in self.rows) / variance for name in ("error", "noise"))
        declared = self.declared
        if declared is None:
            declared = scale * sum(row.expected for row in self.rows) / variance
        allowed = _CALIBRATION * declared + (self._sampling(variances, stored) if self.declared is not None else 0.0)
        roundings = (_ROUNDINGS * rounding_unit(self.dtype)) ** 2 * sum(row.square for row in self.rows) / variance
        spare = _NOISE * noise + roundings
        limit, worst = declared + allowed + spare, max(row.worst for row in self.rows) / (variance / tokens)
        problem = ""
        if self.beyond:
            problem = f"{self.beyond} values are beyond the codec's bound"
        elif self.beyond_sinks:
            problem = self._sinks_problem()
        elif not stored <= limit:
            problem = f"beyond the limit of {limit:.3g}"
        elif self.declared is not None and not worst <= _WORST_TOKEN * (declared + spare):
            problem = f"a token is off by {worst:.3g} of the variance"
        return TargetCheck(
            target=self.target, measure="NMSE", stored=stored, declared=declared, noise=noise, problem=problem
        )

    def _sinks_problem(self) -> str:
        return f"{self.beyond_sinks} sinks are not as they were" if self.beyond_sinks else ""

    def _sampling(self, variances: list[float], ratio: float) -> float:
        """How far the NMSE of these rows may be from that of all rows."""
        assert self.declared is not None
        rows = len(variances)
        if rows < _ENOUGH_ROWS:
            return _FEW_ROWS * self.declared
        spread = sum((row.error - ratio * one) ** 2 for row, one in zip(self.rows, variances, strict=True))
        return _STANDARD_ERRORS * float((rows / (rows - 1) * spread) ** 0.5) / max(sum(variances), 1e-300)


class LargestError:
    """The largest of many errors, each with a bound of its own."""

    def __init__(self, target: str, measure: str) -> None:
        self.target = target
        self.measure = measure
        self.stored = self.declared = self.noise = 0.0
        self.beyond = 0

    def add(
        self, error: torch.Tensor, bound: torch.Tensor | float, noise: torch.Tensor, allowed: torch.Tensor | float
    ) -> None:
        """Errors and their bounds, the noise beside them, and what arithmetic may add to each."""
        self.beyond += int((~(error <= bound + allowed)).sum())
        self.stored = max(self.stored, _largest(error))
        self.declared = max(self.declared, _largest(bound) if isinstance(bound, torch.Tensor) else bound)
        self.noise = max(self.noise, _largest(noise))

    def result(self) -> TargetCheck:
        """The largest error, and the verdict."""
        return TargetCheck(
            target=self.target,
            measure=self.measure,
            stored=self.stored,
            declared=self.declared,
            noise=self.noise,
            problem=f"{self.beyond} are beyond the declared error" if self.beyond else "",
        )


def _largest(values: torch.Tensor) -> float:
    return float(values.amax()) if values.numel() else 0.0
