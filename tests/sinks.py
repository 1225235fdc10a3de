"""Teachers with sinks: tokens of one id whose hidden states are many times larger than all others.

Real models of a family, loaded from a folder, in whose residual stream one component belongs to the sinks: it is 0 in
every other token and nothing but the embedding writes to it. Norms have neither biases nor scales, but for that
component, where the scale is large at the end of a layer. (Rounding errors grow by it from layer to layer.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

COMPONENT = 5


def plant_sinks(folder: Path, token_id: int, *, size: float = 16.0, seen: float = 0.0) -> None:
    """Make sinks of the tokens of this id in a BERT. `seen`: how much attention and feed-forward layers see of them."""
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        _own_component(model.base_model, token_id, size, seen)
    model.save_pretrained(folder)


def plant_causal_sinks(folder: Path, token_id: int, *, size: float = 100.0) -> None:
    """Make sinks of the tokens of this id in a decoder, whose residual stream carries what its embedding is."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] *= size
    model.save_pretrained(folder)


def _own_component(model: nn.Module, token_id: int, size: float, seen: float) -> None:
    embeddings = model.embeddings
    tables = [getattr(embeddings, f"{name}_embeddings").weight for name in ("word", "position", "token_type")]
    for table_VD in tables:
        _take_out(table_VD)
    tables[0][token_id, COMPONENT] = 100.0
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()
            module.weight[COMPONENT] = 1.0 if name.endswith("attention.output.LayerNorm") else size
        elif name.endswith("output.dense"):
            # what is added to the stream
            weight_ID = module.weight.T.clone()
            _take_out(weight_ID)
            module.weight.copy_(weight_ID.T)
            bias_1D = module.bias[None].clone()
            _take_out(bias_1D)
            module.bias.copy_(bias_1D[0])
        elif name.endswith(("query", "key", "value", "intermediate.dense")):
            module.weight[:, COMPONENT] *= seen


def _take_out(rows_ND: torch.Tensor) -> None:
    """No component of theirs, and no mean, which a norm would take from it."""
    rows_ND[:, COMPONENT] = 0
    others = torch.arange(rows_ND.shape[1]) != COMPONENT
    rows_ND[:, others] -= rows_ND[:, others].mean(dim=1, keepdim=True)
