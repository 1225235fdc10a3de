"""How much of a hidden state does a codec lose, and how few bits would do? For `codec.py`, beside bits and rates.

Of one layer, on rows that calibration has not seen, at real positions only:

- NMSE: E||x - x'||^2 / E||x - mean||^2, x being what is coded;
- relation KL: queries, keys and values of the next layer, from the exact hidden state and from the decoded one, are
  split into relation heads, whose relations R = softmax(X X^T / sqrt(d)) are compared: KL(exact || decoded) in nats,
  mean over heads and positions, then over the three. In float64: float32 cannot tell float16 from no error at all;
- bound: the rate of a Gaussian source of the same covariance at the NMSE measured.

And on all rows:

- entropy: order 0, of each component's codes, which no packing or Huffman code beats without context. Scales count.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear

from student_train.kernels.relation import relation_kl
from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import AttentionProjections, split_relation_heads


class Layer:
    """Exact hidden states [R, T, D] of a layer, of which the `held` rows are for measuring; D values a position.

    What is coded, C components, is either `hidden` (C = D), or `attention`: the queries, keys and values of the next
    layer one after another (C = 3 D), if they are linear maps of this hidden state.
    """

    def __init__(
        self, hidden_RTD: torch.Tensor, length_R: torch.Tensor, held: slice, projections: AttentionProjections | None
    ) -> None:
        self.hidden_RTD, self.length_R, self.held = hidden_RTD, length_R, held
        self.real_RT = torch.arange(hidden_RTD.shape[1]) < length_R[:, None]
        covariance_DD = torch.cov(hidden_RTD[held][self.real_RT[held]].double().T, correction=0)
        self._variances = {"hidden": torch.linalg.eigvalsh(covariance_DD)}
        self.weight_CD = self.bias_C = None
        if projections is not None:
            maps = [getattr(projections, name) for name in VECTORS]
            self.weight_CD = torch.cat([one.weight for one in maps]).double()
            self.bias_C = torch.cat([one.bias for one in maps]).double()
            variances_C = torch.linalg.eigvalsh(self.weight_CD @ covariance_DD @ self.weight_CD.T)
            self._variances["attention"] = variances_C[-len(covariance_DD) :]  # the others are 0

    def vectors(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Queries, keys and values [B, T, 3 D] of a hidden state."""
        assert self.weight_CD is not None and self.bias_C is not None
        return linear(hidden_BTD, self.weight_CD.to(hidden_BTD.dtype), self.bias_C.to(hidden_BTD.dtype))

    def squared_error(self, target: str, first: int, have_BTC: torch.Tensor) -> float:
        """Sum over the held ones among rows `first`, … of what is decoded."""
        start = max(first, self.held.start)
        rows = slice(start, max(start, first + len(have_BTC)))
        want_BTD = self.hidden_RTD[rows]
        want_BTC = want_BTD if target == "hidden" else self.vectors(want_BTD)
        error_NC = (have_BTC[start - first :] - want_BTC)[self.real_RT[rows]]
        return float(error_NC.double().square().sum())

    def nmse(self, target: str, squared_error: float) -> float:
        """From the sum over all held rows."""
        return squared_error / int(self.real_RT[self.held].sum()) / float(self._variances[target].sum())

    def relation_kl(self, target: str, rows: slice, have_BTC: torch.Tensor, heads: int) -> float | None:
        """Of these rows as decoded; None where relations are not a function of the hidden state alone."""
        if self.weight_CD is None:
            return None
        have_BTC = have_BTC.double() if target == "attention" else self.vectors(have_BTC.double())
        want_BTC = self.vectors(self.hidden_RTD[rows].double())
        parts = [
            relation_kl(*(split_relation_heads(vectors, heads) for vectors in pair), self.length_R[rows])
            for pair in zip(want_BTC.chunk(len(VECTORS), dim=-1), have_BTC.chunk(len(VECTORS), dim=-1), strict=True)
        ]
        return float(torch.stack(parts).mean())

    def bound(self, target: str, nmse: float) -> float:
        """Bits per value by reverse water-filling over the eigenvalues of the covariance (Cover & Thomas, 10.3.3)."""
        variances_D = self._variances[target].clamp_min(1e-12)
        low, high = 0.0, float(variances_D.max())
        for _ in range(100):
            level = (low + high) / 2
            below = float(variances_D.clamp_max(level).sum()) < nmse * float(variances_D.sum())
            low, high = (level, high) if below else (low, level)
        return float((variances_D / level).clamp_min(1).log2().mean() / 2)


def entropy(arrays: Iterable[NDArray[np.generic]], width: int) -> float:
    """Bits per value of coded arrays [C, N] or [N], for `width` values a token."""
    bits = 0.0
    for array_CN in arrays:
        for elements_N in np.atleast_2d(array_CN):
            if elements_N.itemsize > 2:
                bits += 8 * elements_N.itemsize
                continue
            counts = np.bincount(elements_N.view(f"u{elements_N.itemsize}"))
            shares = counts[counts > 0] / len(elements_N)
            bits -= float((shares * np.log2(shares)).sum())
    return bits / width
