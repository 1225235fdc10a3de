"""Nats of predicted tokens under a causal LM: windows in, sums out, in memory that the vocabulary does not decide.

The base model runs once on a batch of windows; the head follows for some positions at a time, so that there are never
more than `CHUNK_LOGITS` logits (64 MB in float32), however many ids there are. The head is the model's own, and so is
what it does to logits (scales, soft caps); log-probabilities are float32, sums float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_train.evaluate.perplexity.windows import Window
from teacher_cache.models.families import encoder_of
from teacher_cache.models.heads import LMHead

CHUNK_LOGITS = 2**24


class Scorer:
    """Sums the negative log-probabilities of windows' tokens under a model, on the device where it lies."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._head = encoder_of(model), LMHead(model)
        self._device = next(model.parameters()).device
        self._positions = max(1, CHUNK_LOGITS // model.config.vocab_size)

    @torch.inference_mode()
    def nats(self, windows: Sequence[Window]) -> float:
        """Of all tokens that the windows predict. They go through the base model together, padded at the end.

        Nothing that counts sees padding: attention is causal.
        """
        longest = max(len(window.ids) for window in windows)
        ids_BT = torch.zeros((len(windows), longest), dtype=torch.int64)
        real_BT, counts_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, window in enumerate(windows):
            ids_BT[row, : len(window.ids)] = torch.tensor(window.ids)
            real_BT[row, : len(window.ids)] = 1
            # the prediction of a token stands at the one before it
            counts_BT[row, len(window.ids) - 1 - window.predicted : len(window.ids) - 1] = True
        next_BT = torch.cat([ids_BT[:, 1:], ids_BT[:, :1]], dim=1)
        mask_BT = None if bool(real_BT.all()) else real_BT.to(self._device)
        hidden_BTD = self._model(
            input_ids=ids_BT.to(self._device), attention_mask=mask_BT, use_cache=False
        ).last_hidden_state
        counts_BT = counts_BT.to(self._device)
        return self._head_nats(hidden_BTD[counts_BT], next_BT.to(self._device)[counts_BT])

    def _head_nats(self, hidden_PD: Tensor, next_P: Tensor) -> float:
        """[P, D] final hidden states and the ids that follow them -> the sum of their nats."""
        total = 0.0
        for hidden_CD, next_C in zip(hidden_PD.split(self._positions), next_P.split(self._positions), strict=True):
            logits_CV = self._head(hidden_CD).float()
            chosen_C = logits_CV.gather(1, next_C[:, None])[:, 0]
            total += float((logits_CV.logsumexp(1) - chosen_C).double().sum())
        return total
