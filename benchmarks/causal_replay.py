"""A decoder's relations from its layer's input: are fewer bytes needed than for queries, keys and values themselves?

What an attention layer of a decoder reads, the output of its norm, is narrower than the queries, keys and values that
it makes of it (576 components against 960 in SmolLM2-135M). A store could keep that, coded in the metric of the three
projections, and replay these and the rotary positions on load. This script tries both on one teacher and says what
each costs at the same relation KL:

    python benchmarks/causal_replay.py --teacher DIR --corpus FILE --layer 29

- `vectors`: queries, keys and values after rotary positions, each coded by itself, as `--targets attention` keeps them;
- `input`: the output of the norm before attention, coded so that the error of [W_q; W_k; W_v] x counts;
- `input, balanced`: the same, each of the three divided by its own deviation first.

Calibration, rotation, rounding and packing are those of the store; bytes are of packed codes under zstd (level 1), in
pieces of 64 KiB, and of escapes at 6 bytes each, without checksums or what says where shards begin. KL is exact against
decoded, mean of the three relations under the causal mask, in nats a position, on rows that calibration has not seen.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numcodecs import zstd
from record import print_record
from rich.console import Console
from rich.progress import track
from rich.table import Table

from student_train.losses.relations import heads_of, one_relation_loss
from teacher_cache.codecs.nmse import Quantiser, Transform, calibrate
from teacher_cache.codecs.packing import pack_codes
from teacher_cache.codecs.sample import CalibrationSample, share_rows
from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.layers import default_relation_heads
from teacher_cache.contract.manifest import TransformRecord
from teacher_cache.contract.streams import VECTORS
from teacher_cache.corpus.corpus import pack_corpus
from teacher_cache.models.attention import AttentionProjections, Projection
from teacher_cache.teacher.teacher import Teacher

AT_ONCE = 8
"""Rows that the teacher reads at a time."""
PIECE = 2**16
ESCAPE_BYTES = 6


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the layer read and made of it, [R, T, D] each, of rows of `length_R` tokens in segments `starts_RT`."""

    given: torch.Tensor
    vectors: AttentionVectors
    projections: AttentionProjections
    cosine_RTd: torch.Tensor
    sine_RTd: torch.Tensor
    length_R: torch.Tensor
    starts_RT: torch.Tensor


def main() -> None:
    options = parse_options()
    recorded = record(options)
    count = len(recorded.length_R)
    parts = share_rows(count, options.seq_len, sum(vectors_of(recorded.vectors, name).shape[-1] for name in VECTORS))
    if sum(parts) + options.check_rows > count:
        raise SystemExit(f"calibration takes {sum(parts)} of {count} rows: raise --rows")
    measured: dict[str, list[dict[str, Any]]] = {}
    for target in track(options.targets, "coding"):
        for name, one in tried(recorded, parts, target, options.check_rows).items():
            measured.setdefault(name, []).append({"target": target, **one})
    exact = code_given(recorded, parts, None, options.check_rows, balanced=False)
    for name, lines in measured.items():
        for line in lines:
            line["at_equal_kl"] = bytes_at(measured["vectors"], line["kl"]) if name != "vectors" else None
    Console(stderr=True).print(table(measured, options))
    print_record("causal_replay", **vars(options), replay_kl=exact["kl"], measured=measured)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True, nargs="+")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--check-rows", type=int, default=32, help="the last rows, on which all is measured")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.1, 0.05, 0.02, 0.01, 0.005])
    return parser.parse_args()


@torch.inference_mode()
def record(options: argparse.Namespace) -> Recorded:
    """Let the teacher read the rows, and watch the layer."""
    teacher = Teacher.load(options.teacher, device="cpu")
    teacher.tap()
    teacher.start()
    layer = teacher.model.base_model.layers[options.layer - 1]
    rows = pack_corpus(
        tuple(options.corpus), teacher.tokenizer, seq_len=options.seq_len, row_mode="packed", seed=0,
        max_rows=options.rows, segments="isolated", causal=True,
    )  # fmt: skip
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    handle = layer.self_attn.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append((kwargs["hidden_states"], *kwargs["position_embeddings"])),
        with_kwargs=True,
    )
    given, found, lengths, starts = [], [], [], []
    for first in track(range(0, len(rows), AT_ONCE), "the teacher reads the rows"):
        part = rows.read(first, min(first + AT_ONCE, len(rows)))
        length_B, starts_BT = torch.from_numpy(part.length_B), torch.from_numpy(part.starts_BT)
        outputs = teacher.run(
            torch.from_numpy(part.input_ids_BT).long(),
            length_B,
            attention_layers=(options.layer,),
            starts_BT=starts_BT,
        )
        given.append(seen.pop())
        found.append(outputs.attention[options.layer])
        lengths.append(length_B)
        starts.append(starts_BT)
    handle.remove()
    hidden, cosine, sine = (torch.cat([piece.expand(len(n), -1, -1) for piece, n in zip(each, lengths, strict=True)])
                            for each in zip(*given, strict=True))  # fmt: skip
    attention = layer.self_attn
    maps = {
        name: Projection(weight=module.weight.float(), bias=torch.zeros(len(module.weight)))
        for name, module in zip(VECTORS, (attention.q_proj, attention.k_proj, attention.v_proj), strict=True)
    }
    return Recorded(
        given=hidden.float(),
        vectors=AttentionVectors(**{f"{n}_BTD": torch.cat([vectors_of(v, n) for v in found]) for n in VECTORS}),
        projections=AttentionProjections(**maps),
        cosine_RTd=cosine.float(),
        sine_RTd=sine.float(),
        length_R=torch.cat(lengths),
        starts_RT=torch.cat(starts),
    )


def vectors_of(vectors: AttentionVectors, name: str) -> torch.Tensor:
    found: torch.Tensor = getattr(vectors, f"{name}_BTD")
    return found


def tried(recorded: Recorded, parts: tuple[int, int, int], target: float, check: int) -> dict[str, dict[str, Any]]:
    """Every way of keeping the layer at this share of variance lost."""
    return {
        "vectors": code_vectors(recorded, parts, target, check),
        "input": code_given(recorded, parts, target, check, balanced=False),
        "input, balanced": code_given(recorded, parts, target, check, balanced=True),
    }


def code_vectors(recorded: Recorded, parts: tuple[int, int, int], target: float, check: int) -> dict[str, Any]:
    decoded, size = {}, 0.0
    for name in VECTORS:
        values_RTD = vectors_of(recorded.vectors, name).float()
        transform, found = calibrated(values_RTD, recorded, parts, target, None)
        codes_DN, kept_N = quantised(values_RTD[-check:], transform, found, None)
        decoded[f"{name}_BTD"] = restored(codes_DN, kept_N, transform, values_RTD[-check:])
        size += bytes_a_token(codes_DN, kept_N, found)
    return {"bytes": size, "kl": relation_kl(recorded, AttentionVectors(**decoded), check)}


def code_given(
    recorded: Recorded, parts: tuple[int, int, int], target: float | None, check: int, *, balanced: bool
) -> dict[str, Any]:
    """From the layer's input; with `target` None nothing is coded, which tries the replay alone."""
    scales = {name: float(recorded_spread(recorded, name)) if balanced else 1.0 for name in VECTORS}
    weights = {name: getattr(recorded.projections, name).weight / scale for name, scale in scales.items()}
    maps = AttentionProjections(
        **{name: Projection(weight=weight, bias=torch.zeros(len(weight))) for name, weight in weights.items()}
    )
    given_RTH = recorded.given[-check:]
    stacked_RTD = torch.cat([given_RTH @ getattr(maps, name).weight.T for name in VECTORS], dim=-1)
    size = 0.0
    if target is not None:
        transform, found = calibrated(recorded.given, recorded, parts, target, maps)
        codes_DN, kept_N = quantised(given_RTH, transform, found, maps)
        stacked_RTD = restored(codes_DN, kept_N, transform, stacked_RTD)
        size = bytes_a_token(codes_DN, kept_N, found)
    widths = [len(getattr(maps, name).weight) for name in VECTORS]
    split = dict(zip(VECTORS, stacked_RTD.split(widths, dim=-1), strict=True))
    replayed = {
        f"{name}_BTD": values * scales[name] if name == "value" else rotated(values * scales[name], recorded, check)
        for name, values in split.items()
    }
    return {"bytes": size, "kl": relation_kl(recorded, AttentionVectors(**replayed), check)}


def recorded_spread(recorded: Recorded, name: str) -> torch.Tensor:
    """Root of the variance of all components of a vector together, of real tokens."""
    values_ND = (recorded.given @ getattr(recorded.projections, name).weight.T)[real(recorded)]
    return (values_ND - values_ND.mean(0)).square().sum(1).mean().sqrt()


def real(recorded: Recorded) -> torch.Tensor:
    return torch.arange(recorded.given.shape[1])[None] < recorded.length_R[:, None]


def rotated(values_RTD: torch.Tensor, recorded: Recorded, check: int) -> torch.Tensor:
    """Rotary positions, halves of a head against each other (Su et al., 2021), as Llama has them."""
    cosine, sine = recorded.cosine_RTd[-check:, :, None], recorded.sine_RTd[-check:, :, None]
    heads = values_RTD.unflatten(-1, (-1, cosine.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosine + torch.cat([-second, first], dim=-1) * sine).flatten(-2)


def calibrated(
    values_RTD: torch.Tensor,
    recorded: Recorded,
    parts: tuple[int, int, int],
    target: float,
    maps: AttentionProjections | None,
) -> tuple[Transform, TransformRecord]:
    sample, start, real_RT = CalibrationSample(maps), 0, real(recorded)
    for part, count in zip(("fit", "tune", "check"), parts, strict=True):
        rows = slice(start, start + count)
        values_ND = values_RTD[rows][real_RT[rows]]
        if part == "fit":
            sample.fit(values_ND)
        else:
            getattr(sample, part).append(values_ND)
        start += count
    return calibrate(sample, target, maps)


def quantised(
    values_RTD: torch.Tensor, transform: Transform, found: TransformRecord, maps: AttentionProjections | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [K, N], and which tokens [N] are kept beside them."""
    quantiser, values_ND = Quantiser(transform, maps, found.sinks), values_RTD.flatten(0, 1)
    kept_N = quantiser.find_sinks(values_ND)
    kept_N = torch.zeros(len(values_ND), dtype=torch.bool) if kept_N is None else kept_N
    return quantiser.quantise(values_ND, sinks_N=kept_N), kept_N


def restored(
    codes_DN: torch.Tensor, kept_N: torch.Tensor, transform: Transform, exact_RTD: torch.Tensor
) -> torch.Tensor:
    values_ND = transform.synthesise(codes_DN.T.float() * transform.step)
    values_ND[kept_N] = exact_RTD.flatten(0, 1)[kept_N].half().float()
    return values_ND.view(exact_RTD.shape)


def bytes_a_token(codes_DN: torch.Tensor, kept_N: torch.Tensor, found: TransformRecord) -> float:
    packed = pack_codes(codes_DN.numpy(), found.components)
    size = ESCAPE_BYTES * len(packed.escape_index) + int(kept_N.sum()) * 2 * codes_DN.shape[0]
    for values in packed.packed.values():
        data = np.ascontiguousarray(values).tobytes()
        size += sum(len(zstd.compress(data[at : at + PIECE], 1)) for at in range(0, len(data), PIECE))
    return float(size) / codes_DN.shape[1]


def relation_kl(recorded: Recorded, decoded: AttentionVectors, check: int) -> float:
    """Mean of the three relations, nats a position."""
    exact = AttentionVectors(**{f"{name}_BTD": vectors_of(recorded.vectors, name)[-check:].float() for name in VECTORS})
    length_R, starts_RT = recorded.length_R[-check:], recorded.starts_RT[-check:]
    query, key = (vectors_of(exact, name).shape[-1] for name in VECTORS[:2])
    heads = default_relation_heads(query, query), default_relation_heads(key, key)
    found = [
        float(
            one_relation_loss(
                name, decoded, exact, length_R, heads=heads_of(name, *heads), causal=True, starts_BT=starts_RT
            )
        )
        for name in VECTORS
    ]
    return sum(found) / len(found) / int(length_R.sum())


def bytes_at(lines: Sequence[Mapping[str, Any]], kl: float) -> float:
    """What these lines would take at this KL, between two of them in logarithms; beyond the ends by the last two."""
    points = sorted((math.log(line["kl"]), line["bytes"]) for line in lines)
    pairs = list(itertools.pairwise(points))
    low, high = next((pair for pair in pairs if math.log(kl) <= pair[1][0]), pairs[-1])
    return float(low[1] + (high[1] - low[1]) * (math.log(kl) - low[0]) / (high[0] - low[0]))


def table(measured: Mapping[str, Sequence[Mapping[str, Any]]], options: argparse.Namespace) -> Table:
    found = Table("kept", "variance lost", "bytes a token", "causal KL", "vectors at this KL", "ratio")
    found.title = f"attention {options.layer}"
    for name, lines in measured.items():
        for line in lines:
            other = line["at_equal_kl"]
            found.add_row(
                name, f"{line['target']:g}", f"{line['bytes']:.1f}", f"{line['kl']:.4f}",
                "" if other is None else f"{other:.1f}", "" if other is None else f"{line['bytes'] / other:.3f}",
            )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
