"""What an attention layer's projections read, and what happens to their outputs until attention: found by watching.

Most decoders, and encoders like them, put a norm before attention and turn queries and keys by their position after
projection. What the projections read is narrower than the three vectors, and everything after it is known: linear
maps, and a table of cosines and sines. So a store may keep the former and replay the rest. Nothing is decided by a
family's name: modules are watched during forward passes, and what is found must give the recorded vectors again.

Not found where another operation stands between (a norm of each head, one map for all three vectors, an interleaved
arrangement), or where the table depends on how long a batch's rows are. Shapes: B rows, T positions, D width of a
vector, r turned components of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from teacher_cache.contract.batch import AttentionVectors
from teacher_cache.contract.streams import VECTORS
from teacher_cache.models.attention import AttentionProjections, Projection, Replay
from teacher_cache.models.attention_tap import record_attention
from teacher_cache.models.families import kind_of
from teacher_cache.models.inputs import forward_arguments

_TOKENS = 12
_SAME = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest difference of a vector from the one that is computed again, as a share of the largest component."""
_SAME_IN_HALF = 0.03


@dataclass(frozen=True, kw_only=True)
class WatchedLayer:
    """`module` is the name of one that reads what is kept, `width` how wide that is."""

    module: str
    width: int
    projections: AttentionProjections


@contextmanager
def watch_inputs(model: PreTrainedModel, modules: Mapping[int, str]) -> Iterator[dict[int, torch.Tensor]]:
    """What the modules of these names are given in a forward pass, [B, T, D] by layer."""
    seen: dict[int, torch.Tensor] = {}

    def watch(layer: int, name: str) -> Any:
        return model.get_submodule(name).register_forward_pre_hook(
            lambda _module, given: seen.__setitem__(layer, given[0])
        )

    with ExitStack() as hooks:
        for layer, name in modules.items():
            hooks.enter_context(watch(layer, name))
        yield seen


@dataclass(frozen=True, kw_only=True)
class SeenMap:
    """A linear map that was seen: its name, what it was given, and what it gave."""

    name: str
    module: nn.Linear
    given_BTD: torch.Tensor
    made_BTD: torch.Tensor
    version: int | None
    """Of `made_BTD` when it was given; None where tensors keep no count of their changes, in inference mode."""

    @property
    def unchanged(self) -> bool:
        """Whether nothing has changed what it gave in place since, as OLMo's `clip_qkv` does."""
        return self.version is None or self.made_BTD._version == self.version


@contextmanager
def watch_maps(model: nn.Module) -> Iterator[list[SeenMap]]:
    """The linear maps that a forward pass goes through, in this order."""
    seen: list[SeenMap] = []

    def watch(name: str, module: nn.Linear) -> Any:
        return module.register_forward_hook(
            lambda _module, given, made: seen.append(
                SeenMap(
                    name=name,
                    module=module,
                    given_BTD=given[0] if given else made,
                    made_BTD=made,
                    version=None if made.is_inference() else made._version,
                )
            )
        )

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.enter_context(watch(name, module))
        yield seen


def linear_maps(
    seen: Sequence[SeenMap], given_BTD: torch.Tensor, vectors: AttentionVectors, dtype: torch.dtype
) -> AttentionProjections | None:
    """Those of the maps that make queries, keys and values of what is given, bit for bit; None where one is missing."""
    found = {}
    for name in VECTORS:
        vectors_BTD = getattr(vectors, f"{name}_BTD")
        for one in seen:
            if torch.equal(one.given_BTD, given_BTD) and _equal(one.made_BTD, vectors_BTD):
                found[name] = map_of(one.module, dtype)
    if len(found) < len(VECTORS):
        return None
    return AttentionProjections(query=found["query"], key=found["key"], value=found["value"])


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


Table = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [T, r]."""


def find_replay(model: PreTrainedModel, layer: int, seq_len: int, dtype: torch.dtype) -> WatchedLayer | None:
    """How the attention vectors of a layer (1-based) come from what its projections read; None if in another way.

    Args:
        model: tapped.
        layer: which one.
        seq_len: up to which position vectors are turned.
        dtype: the arithmetic in which the model will run.

    Raises:
        TeacherError: attention cannot be recorded.
    """
    maps, tables, vectors = _watch(model, layer, min(_TOKENS, seq_len))
    for value in (one for one in maps if _equal(one.made_BTD, vectors.value_BTD)):
        beside = [one for one in maps if torch.equal(one.given_BTD, value.given_BTD)]
        for name, short in tables.items():
            chosen = _choose(beside, value, short, vectors, model.config.num_attention_heads)
            if chosen is None:
                continue
            whole = _watch_table(model, name, seq_len)
            if whole is None or not all(torch.equal(a, b[: len(a)]) for a, b in zip(short, whole, strict=True)):
                return None  # it depends on the length of the row
            head_width = vectors.query_BTD.shape[-1] // model.config.num_attention_heads
            cosine, sine = (part.float().cpu().clone() for part in whole)
            linear = {n: map_of(one.module, dtype) for n, one in zip(VECTORS, (*chosen, value), strict=True)}
            return WatchedLayer(
                module=value.name,
                width=value.given_BTD.shape[-1],
                projections=AttentionProjections(
                    **linear, replay=Replay(head_width=head_width, cosine_Tr=cosine, sine_Tr=sine)
                ),
            )
    return None


def map_of(module: nn.Linear, dtype: torch.dtype) -> Projection:
    """A linear map as the teacher will use it: rounded to the arithmetic that it runs in."""
    weight = module.weight.detach().to(dtype).float().cpu()
    bias = torch.zeros(weight.shape[0]) if module.bias is None else module.bias.detach().to(dtype).float().cpu()
    return Projection(weight=weight, bias=bias)


def _watch(model: PreTrainedModel, layer: int, tokens: int) -> tuple[list[SeenMap], dict[str, Table], AttentionVectors]:
    """The linear maps and tables of a pass over two short rows, and the vectors of the layer."""
    tables: dict[str, Table] = {}

    def see(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _given: Any, made: Any) -> None:
            if (table := _as_table(made, tokens)) is not None:
                tables[name] = table

        return module.register_forward_hook(hook)

    with ExitStack() as hooks, watch_maps(model) as maps, record_attention(model, (layer,)) as recorded:
        for name, module in model.named_modules():
            hooks.enter_context(see(name, module))
        # a clamp that changes nothing on these tokens would on others: in-place operations are told by their count
        with torch.inference_mode(mode=False), torch.no_grad():
            _pass(model, torch.arange(2 * tokens).view(2, tokens) % model.config.vocab_size)
    return [one for one in maps if one.unchanged], tables, recorded.vectors[layer]


def _watch_table(model: PreTrainedModel, name: str, seq_len: int) -> Table | None:
    """The table of one module for rows of this length."""
    found: list[Table | None] = []
    module = model.get_submodule(name)
    with module.register_forward_hook(lambda _module, _given, made: found.append(_as_table(made, seq_len))):
        _pass(model, torch.arange(seq_len)[None] % model.config.vocab_size)
    return found[-1] if found else None


def _as_table(made: Any, tokens: int) -> Table | None:
    """What a module gave, if it is one cosine and one sine for each position, the same in all rows."""
    if not (isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, torch.Tensor) for part in made)):
        return None
    cosine, sine = made
    if cosine.shape != sine.shape or cosine.ndim != 3 or cosine.shape[1] != tokens or cosine.shape[2] % 2:
        return None
    if not all(torch.equal(part, part[:1].expand_as(part)) for part in made):
        return None
    return cosine[0], sine[0]


def _pass(model: PreTrainedModel, input_ids_BT: torch.Tensor) -> None:
    device = next(model.parameters()).device
    real_BT = torch.ones(input_ids_BT.shape, dtype=torch.bool, device=device)
    starts_BT = None
    if kind_of(model.config) == "causal-lm":
        starts_BT = torch.zeros_like(real_BT)
        starts_BT[:, 0] = True
    model.base_model(input_ids_BT.to(device), **forward_arguments(model, real_BT, starts_BT))


def _choose(
    maps: list[SeenMap], value: SeenMap, table: Table, vectors: AttentionVectors, heads: int
) -> tuple[SeenMap, SeenMap] | None:
    """The maps that make queries and keys with this table, one each."""
    query_width = vectors.query_BTD.shape[-1]
    head_width = query_width // heads
    if query_width % heads or table[0].shape[-1] > head_width or vectors.key_BTD.shape[-1] % head_width:
        return None
    replay = Replay(head_width=head_width, cosine_Tr=table[0].float(), sine_Tr=table[1].float())
    dtype = value.made_BTD.dtype

    def made_by(want_BTD: torch.Tensor) -> SeenMap | None:
        position_BT = torch.arange(want_BTD.shape[1], device=want_BTD.device).expand(want_BTD.shape[:2])
        for one in maps:
            if one.made_BTD.shape == want_BTD.shape:
                have_BTD = replay.to(want_BTD.device).turn(one.made_BTD.float(), position_BT)
                if _same(have_BTD, want_BTD, dtype):
                    return one
        return None

    query, key = made_by(vectors.query_BTD), made_by(vectors.key_BTD)
    return None if query is None or key is None else (query, key)


def _same(have_BTD: torch.Tensor, want_BTD: torch.Tensor, dtype: torch.dtype) -> bool:
    difference = (have_BTD - want_BTD.float()).abs().max()
    return bool(difference <= _SAME.get(dtype, _SAME_IN_HALF) * want_BTD.float().abs().max())
