"""Logits -> what a store keeps of softmax(logits / temperature): its largest entries, or ids drawn from it.

Both work on logits [P, V] of a bounded number of places, on any device, and take an even smaller number of places at a
time for their own arithmetic. Neither depends on which other places are in the batch.

Draws are *stratified*: draw n of N is taken at a random point of the n-th of N equal shares of the probability mass,
the ids in ascending order. Each count still has expectation N p, so that gradients are unbiased, but varies less than
with N independent points: on a 30,522-id masked language model 30 stratified draws are as exact (mean square of
counts / N - p) as 50 independent ones and have 14 distinct ids instead of 19. The points are a hash of (seed, row,
view, place, draw), see `random_bits.py`: the same in every library version, process and batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.codecs.logits import TopkEntries, refuse_undefined
from teacher_cache.device import to_device, to_host
from teacher_cache.random_bits import uniform_bits

_IN_CACHE = 2**18
"""Logits that are turned into probabilities at a time on a CPU (1 MiB in float32)."""
_IN_REACH = 2**21
"""Numbers that `draw_samples` has at hand at a time on a CPU (8 MiB): with few places the calls of many small steps
take longer than the steps."""
_ON_DEVICE = 2**26
"""Numbers that `draw_samples` adds up at a time elsewhere (512 MiB in float64)."""
_SMALL = -80.0
"""Log of the mass below which float32 sums of exponentials lose digits (the smallest normal number is e^-87)."""
_DRAW = 3
"""Coordinate of the hash behind those that masking uses at every position, 0 to 2."""


def topk_log_probabilities(logits_PV: torch.Tensor, entries: int, temperature: float) -> TopkEntries:
    """The `entries` largest log-softmax values at this temperature, and the log of the rest of the mass.

    The tail is summed over the other ids, not taken as 1 - sum(p): the difference of nearly equal numbers would lose
    it. One exponential per logit; where the whole tail is below the smallest float32 it is computed again by
    log-sum-exp.
    """
    if logits_PV.device.type == "cpu" and len(logits_PV) > (rows := max(1, _IN_CACHE // logits_PV.shape[1])):
        # several passes over few rows stay in the processor's cache: more than twice as fast
        parts = [topk_log_probabilities(part_PV, entries, temperature) for part_PV in logits_PV.split(rows)]
        return TopkEntries(
            ids_PK=torch.cat([part.ids_PK for part in parts]),
            log_probs_PK=torch.cat([part.log_probs_PK for part in parts]),
            log_tail_P=torch.cat([part.log_tail_P for part in parts]),
        )
    scaled_PV = logits_PV.to(torch.float32)
    if temperature != 1.0:
        scaled_PV = scaled_PV / temperature
    values_PK, ids_PK = torch.topk(scaled_PV, entries, dim=1)
    # the largest value first: differences of large logits would lose the digits that a sure prediction lives in
    shifted_PV = scaled_PV - values_PK[:, :1]
    powers_PV = shifted_PV.exp()
    total_P1 = powers_PV.sum(dim=1, keepdim=True).log()
    log_tail_P = powers_PV.scatter_(1, ids_PK, 0).sum(dim=1).log() - total_P1[:, 0]
    lost_P = log_tail_P < _SMALL
    if entries < logits_PV.shape[1] and bool(lost_P.any()):
        others_PV = shifted_PV[lost_P].scatter(1, ids_PK[lost_P], float("-inf"))
        log_tail_P[lost_P] = torch.logsumexp(others_PV, dim=1) - total_P1[lost_P, 0]
    return TopkEntries(ids_PK=ids_PK, log_probs_PK=values_PK - values_PK[:, :1] - total_P1, log_tail_P=log_tail_P)


def sample_points(
    seed: int, row_id_P: NDArray[np.int64], view: int, place_P: NDArray[np.integer], draws: int
) -> NDArray[np.float64]:
    """Where in the cumulative distribution to draw: [P, N] points from 0 to 1, ascending, one in each N-th.

    `place_P` numbers the places of a row from 0 (its masked positions, or those of a causal model that are kept),
    `view` the masked views of it.
    """
    draw_N = np.arange(draws)
    bits_PN = uniform_bits(seed, row_id_P[:, None], view, place_P[:, None], _DRAW, draw_N)
    return (draw_N + (bits_PN >> np.uint64(11)) * 2.0**-53) / draws


def draw_samples(logits_PV: torch.Tensor, points_PN: NDArray[np.float64], temperature: float) -> NDArray[np.int32]:
    """The ids at which the cumulative distribution passes each point: [P, N], ascending where the points are.

    Two levels: the sums of runs of about sqrt(V) ids are accumulated in float64, then the ids of the run in which a
    point falls. So the probability of an id is exact to float32 (of exp, and of a sum over a run), however long the
    vocabulary; an id of probability 0 is never drawn.

    Raises:
        TeacherError: the logits of a place have no distribution.
    """
    run = 2 ** math.ceil(math.log2(logits_PV.shape[1]) / 2)
    on_cpu = logits_PV.device.type == "cpu"
    width = logits_PV.shape[1] + 2 * points_PN.shape[1] * run
    places = max(1, (_IN_REACH if on_cpu else _ON_DEVICE) // width)
    rows = max(1, _IN_CACHE // width) if on_cpu else places
    points = to_device(points_PN, logits_PV.device)
    # one piece of memory for all places: to get it anew from the system takes longer than the arithmetic
    runs = -(-logits_PV.shape[1] // run)
    mass_PRr = torch.zeros(min(places, len(logits_PV)), runs, run, device=logits_PV.device)
    parts = []
    for part_PV, part_PN in zip(logits_PV.split(places), points.split(places), strict=True):
        here_PRr = mass_PRr[: len(part_PV)]
        for some_PV, some_PRr in zip(part_PV.split(rows), here_PRr.split(rows), strict=True):
            _put_mass(some_PV, temperature, some_PRr.flatten(1)[:, : logits_PV.shape[1]])
        parts.append(_draw(here_PRr, part_PN).to(torch.int32))
    return to_host(torch.cat(parts))


def _put_mass(logits_PV: torch.Tensor, temperature: float, mass_PV: torch.Tensor) -> None:
    """The probability of each id but for a factor: 1 for the most probable one of a place."""
    logits_PV = logits_PV.to(torch.float32)
    torch.sub(logits_PV, logits_PV.amax(dim=1, keepdim=True), out=mass_PV)
    if temperature != 1.0:
        mass_PV.div_(temperature)
    mass_PV.exp_()


def _draw(mass_PRr: torch.Tensor, points_PN: torch.Tensor) -> torch.Tensor:
    run = mass_PRr.shape[2]
    end_PR = mass_PRr.sum(dim=2).to(torch.float64).cumsum(dim=1)
    refuse_undefined(end_PR)
    total_P1 = end_PR[:, -1:]
    aim_PN = _below(points_PN * total_P1, total_P1)
    run_PN = torch.searchsorted(end_PR, aim_PN, right=True)
    # within the run as a share of it: its sum in float64 is not bit by bit what was added up above
    start_PN = torch.nn.functional.pad(end_PR, (1, 0)).gather(1, run_PN)
    share_PN = (aim_PN - start_PN) / (end_PR.gather(1, run_PN) - start_PN)
    place_P1 = torch.arange(len(mass_PRr), device=mass_PRr.device)[:, None]
    inside_PNr = mass_PRr[place_P1, run_PN].to(torch.float64).cumsum(dim=2)
    held_PN1 = inside_PNr[:, :, -1:]
    aim_PN1 = _below(share_PN[:, :, None] * held_PN1, held_PN1)
    return run_PN * run + torch.searchsorted(inside_PNr, aim_PN1, right=True)[:, :, 0]


def _below(values: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """The values, or the largest number below their limit where they reach it."""
    return values.minimum(torch.nextafter(limits, torch.zeros_like(limits)))
