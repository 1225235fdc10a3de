"""Methods that other packages add: how one is registered, and how it is made and checked when a training asks for it.

In: the name of a method, and the context that its factory is given. Out: the method with its trainable maps. What a
factory must give is `Method` in `base.py`; its losses are weighted, summed, logged, validated and resumed like ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import nn
from transformers import PreTrainedConfig

from student_train.layer_map import LayerMapping, parse_mapping
from student_train.methods.base import Counted, Method
from student_train.registry import ADDED_METHODS, Addition
from student_train.settings import METHODS
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import VIEWS
from teacher_cache.errors import SettingsError
from teacher_cache.read.pool import CacheSource


@dataclass(frozen=True, kw_only=True)
class MethodContext:
    """What a method is made from: the open cache, the student's configuration, and the flags of methods.

    `source` tells what the cache holds (`manifest`), the variance of its hidden states, and reads rows; what it lacks
    is refused after the method was made, from the method's `request`. The flags are those of `TrainSettings`, as they
    were given: a method takes what it needs of them. `seed` is for what a method draws, such as first weights.
    """

    source: CacheSource
    student: PreTrainedConfig
    mapping: str = "uniform+last"
    attention_layer: str | None = None
    relation_heads: int | None = None
    relation_heads_kv: int | None = None
    relation_mask: Literal["causal", "full"] | None = None
    relation_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    topk_loss: Literal["tail", "renormalise"] = "tail"
    seed: int = 0

    @property
    def manifest(self) -> Manifest:
        """What the cache holds, and of which teacher: `manifest.teacher.layers`, `.hidden_size`, `.vocab_size`."""
        return self.source.manifest

    def layer_mapping(self) -> LayerMapping:
        """`--mapping` for these two models.

        Raises:
            SettingsError: it cannot be for their depths.
        """
        return parse_mapping(self.mapping, self.manifest.teacher.layers, self.student.num_hidden_layers)


MethodWithMaps = tuple[Method, nn.ModuleDict]
FactoryT = TypeVar("FactoryT", bound=Callable[[MethodContext], Method | MethodWithMaps])

_READING_LOGITS = ("od", "mlm", "lm")
_OF_RECORDS = (
    "step", "loss", "grad_norm", "lr", "tokens", "rows", "skipped_rows", "seconds", "wait", "memory", "scaled_away",
)  # fmt: skip
"""What a line of metrics.jsonl has besides the losses of the methods."""


def register_method(name: str, *, reads_logits: bool = False) -> Callable[[FactoryT], FactoryT]:
    """A decorator that makes a class or function `--method NAME`, alone or in a sum such as `mha+NAME`.

    It is called with a `MethodContext` once the student's shape is known, and gives a `Method`, or a pair of a method
    and an `nn.ModuleDict` of maps that are trained along, handed to `loss`, and not exported. A `Method` has:

    - `request`, the targets that it reads (`TargetRequest`), and `needs(view)`, what it reads of the student's forward
      pass on each view (`StudentNeeds`): hidden states and attention by layer, 1 being the lowest, or the head;
    - `loss(outputs, batch, projections)`: a `LossSum`, the loss summed over what it counts (a float32 scalar with a
      gradient) and how many that are (an int64 scalar). `outputs[view].hidden[layer]` is the student's [B, T, D_S],
      `batch[view].hidden[layer]` the teacher's [B, T, D_T], `batch[view].real_BT()` says where tokens are;
    - `counted`, what that is: "positions" (real ones), "places" (masked positions, or those whose next token counts) or
      "rows";
    - `describe()`, a JSON object for provenance.json.

    With `reads_logits` the student has a language-modelling head, and `outputs[view].head` maps [P, D_S] to its logits.
    `student_train.registry` says how a command comes to know of it.

    Raises:
        SettingsError: there is a method of that name already, or it cannot be a method's name.
    """

    def register(factory: FactoryT) -> FactoryT:
        # maps are kept in a ModuleDict, whose own attributes no entry can have as its name
        taken = (*METHODS, *_OF_RECORDS, *dir(nn.ModuleDict()))
        ADDED_METHODS.add(Addition(name=name, make=factory, reads_logits=reads_logits), taken)
        return factory

    return register


def reads_logits(name: str) -> bool:
    """Whether a method needs the student's language-modelling head.

    Raises:
        SettingsError: it is none of ours, and cannot be imported.
    """
    addition = None if name in METHODS else ADDED_METHODS.find(name)
    return name in _READING_LOGITS if addition is None else addition.reads_logits


def make_added_method(name: str, context: MethodContext) -> MethodWithMaps:
    """The method that another package has added under this name, and its maps.

    Raises:
        SettingsError: what its factory gives is no method.
        DistillationError: the factory refuses these models or this cache.
    """
    addition = ADDED_METHODS.find(name)
    if addition is None:
        raise ValueError(f"unknown method {name!r}")
    try:
        made: Any = addition.make(context)
    except Exception as error:
        error.add_note(f"while {addition.place} made --method {name}")
        raise
    method, maps = made if isinstance(made, tuple) and len(made) == 2 else (made, nn.ModuleDict())
    problem = _problem(method, maps, addition)
    if problem is not None:
        raise SettingsError(
            f"--method {name!r}: what {addition.place} made cannot be trained with, {problem}; "
            "`student_train.register_method` says what a method has"
        )
    return method, maps


def _problem(method: Any, maps: Any, addition: Addition) -> str | None:
    """Why something cannot be a method, or None."""
    lacking = [name for name in ("counted", "request", "needs", "loss", "describe") if not hasattr(method, name)]
    if lacking:
        return f"since {type(method).__name__} has no {', '.join(lacking)}"
    if method.counted not in get_args(Counted):
        return f"since its `counted` is {method.counted!r} and not one of {', '.join(map(repr, get_args(Counted)))}"
    if not isinstance(method.request, TargetRequest):
        return f"since its `request` is {method.request!r} and no TargetRequest"
    if not isinstance(maps, nn.ModuleDict):
        return f"since its maps are {type(maps).__name__} and no torch.nn.ModuleDict"
    needs = [method.needs(view) for view in VIEWS]
    if not any(needs):
        return "since it reads nothing of the student: its `needs` are empty in every view"
    if any(need.head for need in needs) and not addition.reads_logits:
        return "since it needs the student's language-modelling head and was registered without `reads_logits=True`"
    return None
