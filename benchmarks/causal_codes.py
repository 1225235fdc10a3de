"""Bytes and gradient of each form in which a causal teacher's distribution after a token may be kept.

    python benchmarks/causal_codes.py --teacher DIR --corpus FILE --work DIR

For batches of some thousand positions of text (documents isolated, as a build has them):

- bytes a position: for the store's own forms, of the shards of a real block on disk, with checksums, without what says
  which positions are kept; for others as their formula says, or as published;
- angle: between the gradients that a form and the full distribution give the weights of the student's last layer,
  summed over the batch. Each form's gradient of the final hidden states goes through the final norm and the last layer
  once;
- of draws also what their ids would take from a coder that knows how often the teacher keeps each id (`coded_bytes`).

The store's forms are read back by its reader. What the losses make of them is `causal_forms.py`.

Students, all from the teacher: `near`, with some of its layers (--near, the others dropped uniformly, nothing trained),
near its teacher where few are dropped, as training ends; `half`, as it begins; `far`, logits of `near` times 0.7 with
normal noise of deviation 1. How far each is, as KL(teacher || student), is measured too: it decides the angles, since
what a form adds to a gradient is not less where the gradient is.

The teacher's final states and the figures of each batch stay in --work, and a run goes on from there. Cost for
SmolLM2-135M at 4,096 positions: 4e12 multiplications for a batch, most of them in the last layer, and 0.8 GB for its
logits.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from causal_batches import AT_ONCE, Batch, Student, Texts, store_form
from causal_forms import Gradient, compressed, drawn, joined, keep, left_out, of_targets, spread
from record import print_record
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trials import kept

from student_train.losses.distributions import KeptTargets, Targets, TopkTargets
from teacher_cache.codecs.logits import SampleCodec
from teacher_cache.codecs.sparse_logits import draw_samples
from teacher_cache.contract.targets import LogitsSpec

DRAWS = (8, 12, 16, 24, 50)
TOPK = (12, 64)
SLOTS = 24
SHARE = 0.2
"""The b of `differences`: more does not pay, for the few ids that q expects and p has not decide how it varies."""
STUDENTS = ("near", "half", "far")

PUBLISHED = {50: 114.0, 128: 300.0}
"""The two settings that the README of DistillKit recommends: ids kept, and the bytes a token that it gives."""
PLAIN = {
    12: ("k 12", 6.0 * 12),
    **{k: (f"k {k} (DistillKit's size)", size) for k, size in PUBLISHED.items()},
    64: ("k 64", 6.0 * 64),
}
"""Forms of K exact probabilities: name, and bytes, 6 an entry where nobody says otherwise."""


def main() -> None:
    options = parse_options()
    texts = Texts(options)
    results: dict[str, dict[str, list[float]]] = {}
    measured = []
    for number in range(options.batches):
        found = kept(
            texts.folder / f"batch-{number}",
            {name: value for name, value in vars(options).items() if name not in ("work", "batches")},
            partial(measure, texts, number),
            finished=f"batch {number + 1} of {options.batches} done",
        )
        measured.append({name: found[name] for name in ("entropy", "kl")})
        for form, figures in found["forms"].items():
            for name, value in figures.items():
                results.setdefault(form, {}).setdefault(name, []).append(value)
    medians = {form: {name: statistics.median(each) for name, each in one.items()} for form, one in results.items()}
    report(medians, title=f"medians of {options.batches} batches")
    print_record(
        "causal_codes",
        teacher=texts.teacher.record.name,
        positions=[len(texts.batch(number).places_P) for number in range(options.batches)],
        students={"near": options.near, "half": options.half, "far": "near, logits x 0.7, noise of deviation 1"},
        seq_len=options.seq_len,
        measured=measured,
        median=medians,
        batches=results,
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", "--text", required=True, nargs="+")
    parser.add_argument("--work", required=True, help="folder that keeps what the teacher gave")
    parser.add_argument("--positions", type=int, default=4096, help="of a batch, about")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--near", type=int, default=29, help="layers of the student near its teacher")
    parser.add_argument("--half", type=int, default=15, help="layers of the student where training begins")
    parser.add_argument("--students", default=",".join(STUDENTS), help="some of these")
    return parser.parse_args()


Form = Callable[[slice, Tensor], Gradient]
"""From positions, and the student's q [P, V] there, to the gradient."""


def make_forms(texts: Texts, batch: Batch, scratch: Path) -> dict[str, tuple[float, Form]]:
    """Every form by name: bytes a position, and its gradient."""
    forms: dict[str, tuple[float, Form]] = {}
    for draws in DRAWS:
        spec = LogitsSpec(form="sample", entries=draws, codec="exact", view="plain")
        size, targets = store_form(texts, batch, spec, scratch / f"draws-{draws}")
        forms[f"{draws} draws"] = size, stored(targets)
    for entries in TOPK:
        spec = LogitsSpec(form="topk", entries=entries, codec="root8", view="plain")
        size, targets = store_form(texts, batch, spec, scratch / f"topk-{entries}")
        assert isinstance(targets, TopkTargets)
        forms[f"top {entries}, tail"] = size, stored(targets)
        kept = KeptTargets(targets.ids_PK, targets.log_probs_PK, targets.real_P)
        forms[f"top {entries}, renormalised"] = size, stored(kept)
    return forms | plain_forms(batch) | candidates(batch)


def stored(targets: Targets) -> Form:
    return lambda chunk, q_PV: of_targets(type(targets)(*(part[chunk] for part in targets)), q_PV)


def plain_forms(batch: Batch) -> dict[str, tuple[float, Form]]:
    """What others keep: exact probabilities of the most probable ids, and independent draws."""
    forms: dict[str, tuple[float, Form]] = {}
    tops = [torch.topk(batch.probabilities(chunk), max(PLAIN)) for chunk in batch.chunks()]
    p_PK, ids_PK = torch.cat([top.values for top in tops]), torch.cat([top.indices for top in tops])
    vocabulary = batch.logits_PV.shape[1]
    for k, (name, size) in PLAIN.items():
        ids, p = ids_PK[:, :k], p_PK[:, :k]
        kept = KeptTargets(ids, p.log(), torch.ones(len(p), dtype=torch.bool))
        if k not in TOPK:
            forms[f"{name}, renormalised"] = size, stored(kept)
        forms[f"{name}, rest left out"] = size, lambda at, _, ids=ids, p=p: left_out(ids[at], p[at])
        if k in PUBLISHED:
            forms[f"{name}, rest even"] = size, lambda at, _, ids=ids, p=p: spread(ids[at], p[at], vocabulary)
    points_PN = np.sort(np.random.default_rng(batch.number).random((len(batch.places_P), 50)), axis=1)
    ids_PN = torch.from_numpy(draw_samples(batch.logits_PV, points_PN, 1.0))
    forms["50 independent draws"] = 4.0 * 50, lambda at, _: drawn(ids_PN[at])
    forms["next token alone"] = 0.0, lambda at, _: drawn(batch.labels_P1[at])
    return forms


def candidates(batch: Batch) -> dict[str, tuple[float, Form]]:
    """Forms that the store has not, as bytes of arrays compressed one by one, without a shard around them."""
    forms: dict[str, tuple[float, Form]] = {}
    places, vocabulary = batch.logits_PV.shape
    similar_V = similar_together(batch.weight_VE)
    for order, order_V in {"id": torch.arange(vocabulary), "probability": None, "likeness": similar_V}.items():
        ids_PN = systematic_draws(batch, 24, order_V)
        packed = SampleCodec(draws=24, vocab_size=vocabulary).pack(ids_PN.sort(dim=1).values.numpy())
        size = compressed((packed.distinct_P, *packed.entries.values())) / places
        forms[f"24 systematic draws, ids by {order}"] = size, lambda at, _, ids_PN=ids_PN: drawn(ids_PN[at])
    random = np.random.default_rng(1000 + batch.number)
    samples = {chunk.start: keep(batch.probabilities(chunk), SLOTS, random) for chunk in batch.chunks()}
    whole = joined(list(samples.values()))
    sizes = [whole.bytes(vocabulary, every_p=every) / places for every in (False, True)]
    forms[f"{SLOTS} slots, thresholded"] = sizes[0], lambda at, _: samples[at.start].gradient()
    forms[f"{SLOTS} slots, differences"] = sizes[1], lambda at, q_PV: samples[at.start].differences(q_PV, SHARE)
    return forms


def systematic_draws(batch: Batch, draws: int, order_V: Tensor | None) -> Tensor:
    """Ids at points 1/N apart of the cumulative distribution, one random start a place, in this order of the ids.

    None: the most probable ids of each place first. In every order each id is drawn N p times on average.
    """
    random, parts = np.random.default_rng(500 + batch.number), []
    for chunk in batch.chunks():
        logits_PV = batch.logits_PV[chunk]
        if order_V is None:
            ordered_PV, ids_PV = logits_PV.sort(dim=1, descending=True)
        else:
            ordered_PV, ids_PV = logits_PV[:, order_V], order_V.expand_as(logits_PV)
        points_PN = (np.arange(draws) + random.random((len(logits_PV), 1))) / draws
        parts.append(ids_PV.gather(1, torch.from_numpy(draw_samples(ordered_PV, points_PN, 1.0)).long()))
    return torch.cat(parts)


def similar_together(weight_VE: Tensor, levels: int = 9) -> Tensor:
    """An order of the ids in which those whose rows of the head are alike are near each other.

    Halved again and again along the direction in which the rows of each part differ most (power iteration).
    """

    def halved(ids_K: Tensor, levels: int) -> Tensor:
        if levels == 0 or len(ids_K) < 4:
            return ids_K
        centred_KE = weight_VE[ids_K] - weight_VE[ids_K].mean(0)
        direction_E = torch.ones(weight_VE.shape[1])
        for _ in range(6):
            direction_E = centred_KE.T @ (centred_KE @ direction_E)
            direction_E /= direction_E.norm()
        sorted_K = ids_K[(centred_KE @ direction_E).argsort()]
        return torch.cat([halved(part, levels - 1) for part in sorted_K.tensor_split(2)])

    return halved(torch.arange(len(weight_VE)), levels)


def measure(texts: Texts, number: int, folder: Path) -> dict[str, Any]:
    """Bytes and angles of every form on one batch."""
    batch, options = texts.batch(number), texts.options
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        forms = make_forms(texts, batch, Path(scratch))
    found = {name: {"bytes": size} for name, (size, _) in forms.items()}
    found["24 draws"]["coded"] = coded_bytes(batch, 24)
    expected_PE, noise, kl = batch.expected(), torch.Generator().manual_seed(number), {}
    for layers, names in ((options.near, ("near", "far")), (options.half, ("half",))):
        wanted = [name for name in names if name in options.students.split(",")]
        if not wanted:
            continue
        student = Student(options.teacher, layers, texts.teacher)
        final_PE = student.final(batch)
        for name in wanted:
            say(f"batch {number + 1}: {name}")
            gradients, kl[name] = hidden_gradients(
                batch, forms, final_PE.detach(), expected_PE, noise if name == "far" else None
            )
            full = student.gradient(final_PE, gradients.pop("full"))
            for form, gradient_PE in gradients.items():
                own = student.gradient(final_PE, gradient_PE)
                cosine = float(own @ full / own.norm() / full.norm())
                found[form][name] = math.degrees(math.acos(min(1.0, cosine)))
                found[form][f"{name}, length"] = float(own.norm() / full.norm())
    return {
        "entropy": batch.entropy(),
        "kl": kl,
        "forms": {form: {name: float(f"{value:.4g}") for name, value in one.items()} for form, one in found.items()},
    }


def coded_bytes(batch: Batch, draws: int) -> float:
    """What draws would take if each id had -log2 of the share in which the teacher keeps it, in bits; not written.

    Shares are those of the first half of the positions, and the draws those of the second. The order of the k ids of a
    place is nothing to code, log2 k! bits; how many there are, and their counts, have their entropy.
    """
    half = len(batch.places_P) // 2
    shares_V = sum(
        (draws * batch.logits_PV[start : min(start + AT_ONCE, half)].softmax(1)).clamp_max(1).sum(0)
        for start in range(0, half, AT_ONCE)
    )
    assert isinstance(shares_V, Tensor)
    bits_V = -(shares_V / shares_V.sum()).log2()
    points_PN = np.arange(draws) + np.random.default_rng(0).random((len(batch.places_P) - half, draws))
    ids_PN = draw_samples(batch.logits_PV[half:], points_PN / draws, 1.0)
    packed = SampleCodec(draws=draws, vocab_size=len(bits_V)).pack(ids_PN)
    taken = sum(
        float(bits_V[np.unique(ids_N)].sum()) - math.lgamma(len(np.unique(ids_N)) + 1) / math.log(2) for ids_N in ids_PN
    )
    for values in (packed.distinct_P, packed.entries["counts"]):
        share = np.unique(values, return_counts=True)[1] / len(values)
        taken -= len(values) * float((share * np.log2(share)).sum())
    return taken / 8 / len(ids_PN)


def hidden_gradients(
    batch: Batch,
    forms: dict[str, tuple[float, Form]],
    final_PE: Tensor,
    expected_PE: Tensor,
    noise: torch.Generator | None,
) -> tuple[dict[str, Tensor], float]:
    """The gradient of the final states [P, E] by form, and of the full distribution; and KL(teacher || student).

    With `noise`, of noisy logits.

    Noisy logits are z' = 0.7 z + noise, of which the gradient is 0.7 times; that changes no angle, and is left out.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("full", *forms)}
    kl = 0.0
    for chunk in batch.chunks():
        logits_PV = final_PE[chunk] @ batch.weight_VE.T
        if noise is not None:
            logits_PV = 0.7 * logits_PV + torch.randn(logits_PV.shape, generator=noise)
        q_PV = logits_PV.softmax(1)
        log_p_PV = batch.logits_PV[chunk].log_softmax(1)
        kl += float((log_p_PV.exp() * (log_p_PV - logits_PV.log_softmax(1))).sum())
        own_PE = q_PV @ batch.weight_VE
        parts["full"].append(own_PE - expected_PE[chunk])
        for name, (_, form) in forms.items():
            parts[name].append(form(chunk, q_PV).hidden_gradient(own_PE, batch.weight_VE))
    return {name: torch.cat(each) for name, each in parts.items()}, kl / len(final_PE)


def report(medians: dict[str, dict[str, float]], title: str) -> None:
    table = Table("form", "bytes", *STUDENTS, title=f"{title}; angles in degrees")
    for form, one in medians.items():
        size = f"{one['bytes']:.1f}" + (f" ({one['coded']:.1f})" if "coded" in one else "")
        table.add_row(form, size, *(f"{one[name]:.1f}" if name in one else "–" for name in STUDENTS))
    Console(stderr=True, width=110).print(table)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
