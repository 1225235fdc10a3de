"""The distributions of one row -> the K most probable ids of each place, as a store keeps them; or a refusal.

What an engine writes down is rounded, and some write other numbers than log-probabilities. So each place is checked to
be part of a distribution. The mass outside the kept ids is what is left to 1: an engine gives no more of it, so that a
tail below the rounding of its numbers is not known and is kept as what the difference says. A place that lists fewer
than K ids is filled up with ids of probability 0, whose share is in the tail: the last ones of the vocabulary that it
does not list, where paddings and reserved tokens are.

Shapes: P places, n listed ids of the longest, K kept ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.logits import TopkEntries
from teacher_cache.importing.source import Distributions, SourceRow, refuse

_ROUNDED = 1e-3
"""How far above 0 a log-probability may be: that of a sure token in half precision."""


def check_ids(row: SourceRow, tokens: int, where: str) -> None:
    """Check that a row's ids are `tokens` ids of the tokenizer, which go from 0 to `tokens` - 1.

    Raises:
        SourceError: they are not, or there is nothing that follows from anything.
    """
    ids_T = row.input_ids_T
    if len(ids_T) < 2:
        refuse(where, f"{len(ids_T)} tokens: nothing follows from anything there; leave the row out")
    beyond = ids_T[(ids_T < 0) | (ids_T >= tokens)]
    if len(beyond):
        refuse(
            where,
            f"token id {beyond[0]} is none of the tokenizer, whose ids end at {tokens - 1}: it would be read as other "
            "words; give the tokenizer of the teacher that made these files",
        )


def most_probable(found: Distributions, entries: int, vocab_size: int, where: str) -> TopkEntries:
    """The `entries` most probable ids of each place, the log of the mass outside them, in float32.

    Raises:
        SourceError: an entry is not part of a distribution over `vocab_size` ids.
    """
    ids_Pn, log_probs_Pn, listed_Pn = _pad(found)
    _check(found, ids_Pn, log_probs_Pn, listed_Pn, vocab_size, where)
    order_Pn = np.argsort(-log_probs_Pn, axis=1, kind="stable")
    ids_PK = np.take_along_axis(ids_Pn, order_Pn, axis=1)[:, :entries]
    log_probs_PK = np.take_along_axis(log_probs_Pn, order_Pn, axis=1)[:, :entries]
    kept_PK = np.take_along_axis(listed_Pn, order_Pn, axis=1)[:, :entries]
    if (lacking := entries - ids_PK.shape[1]) > 0:
        ids_PK = np.pad(ids_PK, ((0, 0), (0, lacking)), constant_values=-1)
        log_probs_PK = np.pad(log_probs_PK, ((0, 0), (0, lacking)), constant_values=-np.inf)
        kept_PK = np.pad(kept_PK, ((0, 0), (0, lacking)))
    for place in np.flatnonzero(~kept_PK.all(axis=1)):
        _fill(ids_PK[place], kept_PK[place], vocab_size)
    mass_P = np.exp(log_probs_PK).sum(axis=1)
    # rounding may have made a little more than 1 of them
    log_probs_PK = log_probs_PK - np.log(np.maximum(mass_P, 1))[:, None]
    whole_P = (mass_P >= 1) | (kept_PK.sum(axis=1) == vocab_size)
    log_tail_P = np.log1p(-np.where(whole_P, 0, mass_P))
    log_tail_P[whole_P] = -np.inf
    return TopkEntries(
        ids_PK=torch.from_numpy(ids_PK),
        log_probs_PK=torch.from_numpy(log_probs_PK).float(),
        log_tail_P=torch.from_numpy(log_tail_P).float(),
    )


def _pad(found: Distributions) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """Ids, log-probabilities and which of them are listed [P, n]; -1 and -inf where none is."""
    width = int(found.count_P.max())
    listed_Pn = np.arange(width) < found.count_P[:, None]
    ids_Pn = np.full(listed_Pn.shape, -1, dtype=np.int64)
    log_probs_Pn = np.full(listed_Pn.shape, -np.inf)
    ids_Pn[listed_Pn], log_probs_Pn[listed_Pn] = found.ids_E, found.log_probs_E
    # what is above 0 by more than rounding stays, to be refused
    log_probs_Pn[(log_probs_Pn > 0) & (log_probs_Pn <= _ROUNDED)] = 0
    return ids_Pn, log_probs_Pn, listed_Pn


def _check(
    found: Distributions,
    ids_Pn: NDArray[np.int64],
    log_probs_Pn: NDArray[np.float64],
    listed_Pn: NDArray[np.bool_],
    vocab_size: int,
    where: str,
) -> None:
    def place(wrong_Pn: NDArray[np.bool_]) -> tuple[int, int, str]:
        row, column = (int(values[0]) for values in np.nonzero(wrong_Pn))
        return row, column, f"{where}, the distribution of token {found.position_P[row] + 1}"

    if (wrong_Pn := listed_Pn & ((ids_Pn < 0) | (ids_Pn >= vocab_size))).any():
        row, column, there = place(wrong_Pn)
        refuse(
            there,
            f"id {ids_Pn[row, column]} is beyond the vocabulary of {vocab_size} ids: it is that of another model; give "
            "the --teacher-config of the model that made these files",
        )
    if (wrong_Pn := np.isnan(log_probs_Pn)).any():
        row, column, there = place(wrong_Pn)
        refuse(there, f"the log-probability of id {ids_Pn[row, column]} is not a number; compute the row again")
    if (wrong_Pn := log_probs_Pn > 0).any():
        row, column, there = place(wrong_Pn)
        refuse(
            there,
            f"the log-probability of id {ids_Pn[row, column]} is {log_probs_Pn[row, column]:g}, above 0: it is no "
            "logarithm of a probability (a logit, or a probability, perhaps); write log-softmax values",
        )
    # missing entries are numbered apart, so that they equal no id and each other neither
    apart_Pn = np.sort(np.where(listed_Pn, ids_Pn, -1 - np.arange(ids_Pn.shape[1])), axis=1)
    if (wrong_Pn := apart_Pn[:, 1:] == apart_Pn[:, :-1]).any():
        row, column, there = place(wrong_Pn)
        refuse(there, f"id {apart_Pn[row, column]} is listed twice: which of its probabilities counts is not said")
    mass_P = np.exp(log_probs_Pn).sum(axis=1)
    if (wrong_P := mass_P > 1 + found.rounding).any():
        row, _, there = place(wrong_P[:, None])
        refuse(
            there,
            f"the probabilities of its {found.count_P[row]} ids are {mass_P[row]:.6g} together, more than 1: they are "
            "of no distribution; write log-softmax values over the whole vocabulary",
        )
    if (wrong_P := mass_P == 0).any():
        _, _, there = place(wrong_P[:, None])
        refuse(there, "none of its ids has any probability: there is nothing to learn; leave the entry out")


def _fill(ids_K: NDArray[np.int64], kept_K: NDArray[np.bool_], vocab_size: int) -> None:
    """Put ids that are not listed where none is, from the end of the vocabulary on."""
    listed = set(ids_K[kept_K].tolist())
    free = (number for number in range(vocab_size - 1, -1, -1) if number not in listed)
    for column in np.flatnonzero(~kept_K):
        ids_K[column] = next(free)
