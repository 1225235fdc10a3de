"""How many bytes a token do the relations of a decoder's layer take, and how far are those decoded from the exact ones?

    kdcache build --teacher DIR --corpus FILE --targets attention --precision float16 --seq-len 256 --max-rows 160 \
        --out exact.zarr
    kdcache derive exact.zarr e-2.zarr --precision nmse:1e-2
    kdcache derive exact.zarr e-1.zarr --precision nmse:1e-1
    python benchmarks/causal_relations.py exact.zarr e-2.zarr e-1.zarr

With `--relations qkv` the vectors themselves are kept, as of teachers whose vectors cannot be replayed.

Of each store, on the last --rows rows, which calibration must not have seen (it takes 128 of 160):

- bytes a token of queries, keys and values, or of what they are computed from: arrays on disk, with checksums, by all
  rows of the store;
- variance lost, E||x - x'||^2 / E||x - mean||^2, of tokens that are no sinks;
- relation KL, exact against decoded, in nats a position: under a causal mask and over the whole document, in the heads
  that `mha` compares a student of the teacher's own widths in.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import print_record
from rich.console import Console
from rich.table import Table

from student_train.losses.relations import heads_of, one_relation_loss
from student_train.methods.relation_heads import default_heads, taught_widths
from teacher_cache.contract.batch import TargetBatch, TargetRequest
from teacher_cache.contract.streams import VECTORS
from teacher_cache.read.info import describe_store
from teacher_cache.read.reader import CacheReader


def main() -> None:
    options = parse_options()
    exact = CacheReader.open(options.exact)
    (layer,) = exact.manifest.targets.attention_layers()
    measured = [measure(exact, path, layer, options.rows) for path in options.stores]
    Console(stderr=True).print(make_table(layer, measured))
    print_record("causal_relations", layer=layer, rows=options.rows, stores=measured)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exact")
    parser.add_argument("stores", nargs="+")
    parser.add_argument("--rows", type=int, default=32)
    return parser.parse_args()


def measure(exact: CacheReader, path: str, layer: int, rows: int) -> dict[str, Any]:
    reader, info = CacheReader.open(path), describe_store(path)
    spec = reader.manifest.targets.find_attention(layer)
    assert spec is not None
    request, found = TargetRequest(attention_layers=(layer,)), {"precision": spec.codec}
    held = [array for array in info.bytes_per_array if array.startswith(f"attention/{layer}/")]
    found["bytes"] = {
        name: sum(info.bytes_per_token(array) for array in held if array.split("/")[2] == name)
        for name in dict.fromkeys(array.split("/")[2] for array in held)
    }
    want, have = (
        one.read_rows(reader.manifest.rows - rows, reader.manifest.rows, request)["plain"] for one in (exact, reader)
    )
    found["lost"] = {name: lost(want, have, layer, name) for name in VECTORS}
    widths = taught_widths(reader.manifest, [layer])
    heads = default_heads(widths, widths)
    for mask in ("causal", "full"):
        found[mask] = {
            name: float(
                one_relation_loss(
                    name,
                    have.attention[layer],
                    want.attention[layer],
                    want.length_B,
                    heads=heads_of(name, *heads),
                    causal=mask == "causal",
                    starts_BT=want.starts_BT,
                )
                / want.length_B.sum()
            )
            for name in VECTORS
        }
    return found | {"heads": list(heads), "tokens": int(want.length_B.sum())}


def lost(want: TargetBatch, have: TargetBatch, layer: int, name: str) -> float:
    """Share of the variance of ordinary tokens."""
    ordinary_BT = have.ordinary_attention_BT(layer)
    want_ND, have_ND = (getattr(one.attention[layer], f"{name}_BTD")[ordinary_BT].double() for one in (want, have))
    squared: torch.Tensor = (have_ND - want_ND).square().sum()
    return float(squared / (want_ND - want_ND.mean(0)).square().sum())


def make_table(layer: int, measured: list[dict[str, Any]]) -> Table:
    table = Table("precision", "bytes a token", "of", "variance lost", "causal KL", "full KL")
    table.title = f"attention {layer}"
    for found in measured:
        parts = [
            ", ".join(f"{name} {size:.0f}" for name, size in found["bytes"].items()),
            *(", ".join(f"{found[what][name]:.2g}" for name in VECTORS) for what in ("lost", "causal", "full")),
        ]
        table.add_row(found["precision"], f"{sum(found['bytes'].values()):.1f}", *parts)
    return table


if __name__ == "__main__":
    main()
