"""Folders of .safetensors files, one a row, with token ids and hidden states -> rows.

What speculators and SpecForge keep for training drafts, and what vLLM's connector for hidden states writes: `input_ids`
or `token_ids` [T], and `hidden_states`: of L layers [T, L, D], as vLLM gives them, or [L, T, D], or side by side
[T, L * D], as SpecForge does; of one layer [T, D]. A first axis of 1 is a batch of one row. `loss_mask` [T] says, where
it is there, which tokens a model is to learn. (https://docs.vllm.ai, hidden state extraction; the data preparation of
https://docs.sglang.ai/SpecForge; vllm-project/speculators, training data.) Which layers they are is not in the files:
`--layers` says it, in their order, counted as Transformers does, 0 being the embeddings and the last one the states
after the final norm; vLLM gives its last layer before that norm, which no import can tell from the other.

Where T equals L in a file its axes are read as in the others. Pickled files (.ckpt, .pt) can run code when they are
loaded, and are not read. Cost: a row at a time in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from teacher_cache.contract.manifest import sha256_of_json
from teacher_cache.errors import SettingsError, SourceError
from teacher_cache.importing.files import hash_file, refuse_changed, state_of, unreadable
from teacher_cache.importing.source import SourceRow, refuse

SUFFIX = ".safetensors"
_IDS = ("input_ids", "token_ids")
_STATES = "hidden_states"
_LEARNT = "loss_mask"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Axes = Literal["token", "layer"]
"""Which axis of three comes first."""


class HiddenSource:
    """Files with the hidden states of these layers, `width` components each; `last` is the teacher's last layer."""

    shape = "hidden"

    def __init__(self, files: Sequence[Path], layers: Sequence[int], *, width: int, last: int) -> None:
        """Hash every file, and read what shapes its tensors have.

        Raises:
            SourceError: a file cannot be read, or holds other tensors.
            SettingsError: which of the axes are layers cannot be told.
        """
        self.files = tuple(files)
        self.layers, self._width, self._last = tuple(layers), width, last
        self._states = [state_of(path) for path in files]
        shapes = [self._look(path) for path in files]
        self.dtype = _DTYPES[shapes[0][1]]
        other = next((path for path, (_, dtype) in zip(files, shapes, strict=True) if dtype != shapes[0][1]), None)
        if other is not None:
            raise SourceError(
                f"the source file {str(other)!r} has hidden states of another type than {str(files[0])!r}: a store "
                "says of one type what its teacher computed in; convert them to one"
            )
        self._axes = self._choose_axes([shape for shape, _ in shapes])
        hashes = [hash_file(path) for path in files]
        self.fingerprint = sha256_of_json({"shape": self.shape, "layers": self.layers, "files": hashes})
        self.unit_R: NDArray[np.int64] = np.arange(len(files))

    def where(self, row: int) -> str:
        return f"the source file {str(self.files[row])!r}"

    def notes(self) -> Iterator[str]:
        """What no file says of the last layer."""
        if self._last in self.layers:
            yield (
                f"hidden state {self._last} is the last one: it is taken to be after the final norm, as Transformers "
                "gives it; what vLLM writes is before that norm, and would be learnt as it is"
            )

    def read(self, row: int) -> SourceRow:
        path, where = self.files[row], self.where(row)
        refuse_changed(path, self._states[row])
        tensors = _load(path)
        ids_T = _without_batch(next(tensors[name] for name in _IDS if name in tensors), 1)
        if ids_T.is_floating_point() or ids_T.ndim != 1:
            refuse(where, f"its ids are {ids_T.dtype} of shape {tuple(ids_T.shape)}: give whole numbers, one a token")
        states = tensors[_STATES]
        states_LTD = self._by_layer(states, len(ids_T), where)
        if not bool(states_LTD.isfinite().all()):
            refuse(where, "a hidden state is infinite or not a number: nothing can be learnt from it; compute it again")
        learnt = tensors.get(_LEARNT)
        learnt_T = None if learnt is None else _without_batch(learnt, 1).bool().numpy()
        if learnt_T is not None and learnt_T.shape != (len(ids_T),):
            refuse(where, f"its {_LEARNT!r} has the shape {learnt_T.shape} for {len(ids_T)} tokens: give one a token")
        return SourceRow(
            input_ids_T=ids_T.long().numpy(),
            hidden=dict(zip(self.layers, states_LTD, strict=True)),
            learnt_T=learnt_T,
        )

    def _look(self, path: Path) -> tuple[tuple[int, ...], str]:
        """Shape and type of a file's hidden states; nothing but its header is read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = set(file.keys())
                lacking = _STATES if _STATES not in names else "input_ids"
                if _STATES not in names or not names.intersection(_IDS):
                    raise SourceError(
                        f"the source file {str(path)!r} holds {', '.join(sorted(names)) or 'nothing'} and lacks "
                        f"{lacking!r}: a row is {' or '.join(_IDS)} with {_STATES}; give files of that shape"
                    )
                states = file.get_slice(_STATES)
                shape, dtype = tuple(states.get_shape()), str(states.get_dtype())
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
        if dtype not in _DTYPES:
            raise SourceError(
                f"the source file {str(path)!r} has hidden states of type {dtype}: they must be one of "
                f"{', '.join(_DTYPES)}; convert them"
            )
        return shape, dtype

    def _choose_axes(self, shapes: Sequence[tuple[int, ...]]) -> Axes:
        """Which axis comes first, by the files in which only one of them can be the layers."""
        layers, found = len(self.layers), set[Axes]()
        for shape in map(self._of_row, shapes):
            if len(shape) == 3 and shape[0] != shape[1]:
                found |= {"layer"} if shape[0] == layers else {"token"} if shape[1] == layers else set()
        if len(found) > 1:
            raise SourceError(
                f"some files have hidden states of [{layers} layers, tokens, width], others of [tokens, {layers} "
                "layers, width]: rows of as many tokens as layers could be read either way; give files of one kind"
            )
        if not found and any(len(shape) == 3 for shape in map(self._of_row, shapes)):
            raise SettingsError(
                f"--layers names {layers} layers, and the files have hidden states of the shapes "
                f"{', '.join(sorted(set(map(str, shapes)))[:4])}: which axis is that of the layers cannot be told; "
                "name every layer that is in them, in their order"
            )
        return found.pop() if found else "token"

    def _of_row(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape without the axis of a batch of one row."""
        batched = len(shape) == 4 or (len(shape) == 3 and shape[2] != self._width)
        return shape[1:] if batched and shape[0] == 1 else shape

    def _by_layer(self, states: torch.Tensor, tokens: int, where: str) -> torch.Tensor:
        """Hidden states as [L, T, D], or a refusal."""
        layers, width = len(self.layers), self._width
        given = tuple(states.shape)
        states = states.reshape(self._of_row(given))
        if states.ndim == 3:
            states = states if self._axes == "layer" else states.transpose(0, 1)
        elif states.ndim == 2 and states.shape[1] == layers * width:
            states = states.unflatten(1, (layers, width)).transpose(0, 1)
        if tuple(states.shape) != (layers, tokens, width):
            refuse(
                where,
                f"its hidden states have the shape {given} for {tokens} tokens, {layers} layers and the teacher's "
                f"width of {width}: give [tokens, layers, width], [layers, tokens, width], or layers side by side, and "
                "name in --layers those that are there",
            )
        return states.contiguous()


def parse_layer_list(text: str | None, layers: int) -> tuple[int, ...]:
    """The layers that `--layers` names, in that order, of a teacher that has so many.

    Raises:
        SettingsError: there is none, or one is named twice or does not exist.
    """
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    if not parts or not all(part.isdecimal() for part in parts):
        raise SettingsError(
            f"--layers {text!r} does not say which layers' hidden states the files hold: students would learn from the "
            "wrong ones; name them in the order in which they stand there, such as --layers 2,16,30"
        )
    found = tuple(map(int, parts))
    beyond = next((layer for layer in found if layer > layers), None)
    if beyond is not None or len(set(found)) < len(found):
        what = "names a layer twice" if beyond is None else f"names layer {beyond}, and the teacher has {layers}"
        raise SettingsError(f"--layers {text!r} {what}: name each layer that the files hold once, from 0 to {layers}")
    return found


def _load(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


def _without_batch(values: torch.Tensor, axes: int) -> torch.Tensor:
    """A tensor of a batch of one row as that of the row."""
    return values[0] if values.ndim == axes + 1 and values.shape[0] == 1 else values
