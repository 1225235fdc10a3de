"""How many floating-point operations a second this device does in a forward pass and in a training step of an encoder.

    python benchmarks/device_profile.py --device cuda --dtype bfloat16 --out h200.json

`kdcache plan --profile FILE` and `kdtrain --dry-run --profile FILE` read the file on another machine, count the
operations of what they plan, and divide. The encoder has random weights. Operations are counted as PyTorch's
`FlopCounterMode` does: matrix products and attention, a multiplication and an addition being two.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import describe_machine, print_record
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from teacher_cache.profiles import FORMAT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder")
    parser.add_argument("--width", type=int, default=768, help="of the encoder, in heads of 64")
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes, of which the median counts")
    parser.add_argument("--out", type=Path, help="write the profile here")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        intermediate_size=4 * options.width,
        max_position_embeddings=options.seq_len,
    )
    model = BertModel(config).to(options.device, getattr(torch, options.dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids_BT = torch.randint(0, config.vocab_size, (options.batch_size, options.seq_len), device=options.device)

    def forward() -> None:
        with torch.inference_mode():
            model(ids_BT)

    def train() -> None:
        model(ids_BT).last_hidden_state.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    rates = {
        name: rate(step, options.device, options.repeats) for name, step in (("forward", forward), ("training", train))
    }
    name = torch.cuda.get_device_name() if options.device == "cuda" else describe_machine()["processor"]
    profile = {
        "format": FORMAT,
        "name": name or platform.machine(),
        "device": options.device,
        "dtype": options.dtype,
        **{f"{kind}_flops_per_second": found for kind, found in rates.items()},
        "measured": {key: value for key, value in vars(options).items() if key != "out"},
    }
    if options.out is not None:
        options.out.write_text(json.dumps(profile, indent=1) + "\n", encoding="utf-8")
    for kind, found in rates.items():
        print(f"{kind:<10}{found:.3g} operations a second")
    print_record("device_profile", profile=profile)


def rate(step: Callable[[], None], device: str, repeats: int) -> float:
    """Operations a second of a step."""
    with FlopCounterMode(display=False) as counter:  # the first one warms up, too
        step()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return counter.get_total_flops() / statistics.median(seconds)


if __name__ == "__main__":
    main()
