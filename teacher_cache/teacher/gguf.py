"""Teachers in GGUF files, the form of llama.cpp: unpacked to plain float32 weights as they are loaded.

Named by the path of the file, or by hub id and file (`OWNER/NAME/model.gguf`). Transformers reads configuration,
tokenizer and weights out of it, of the architectures and number types that it knows; the packages `gguf` and
`accelerate` are needed for that. What a store keeps of such a teacher is a plain Hugging Face folder.

Cost: the unpacked model, four bytes a weight; and a few seconds for the lists of the vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from teacher_cache.errors import TeacherError
from teacher_cache.hub import why_unreadable

_SUFFIX = ".gguf"
_ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_PACKAGES = ("gguf", "accelerate")


def is_gguf(name: str) -> bool:
    """Whether a teacher's name is that of a GGUF file, as Transformers tells them: in small letters."""
    return name.endswith(_SUFFIX)


def locate(name: str) -> tuple[str, dict[str, str]]:
    """What Transformers is to load a teacher from: a folder or hub id, and the options that say which file of it.

    Raises:
        TeacherError: the teacher is a GGUF file, and a package that reads it is not installed.
    """
    if not is_gguf(name):
        return name, {}
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise TeacherError(
                f"teacher {name!r} is a GGUF file, and to unpack it takes the package {package!r}, which is not "
                "installed: pip install 'kdcache[gguf]'"
            )
    path = Path(name)
    if not path.parent.is_dir() and not path.is_absolute() and len(path.parts) > 2:
        owner, repository, *inside = path.parts
        return f"{owner}/{repository}", {"gguf_file": "/".join(inside)}
    return str(path.parent), {"gguf_file": path.name}


def unpacking(name: str) -> dict[str, Any]:
    """Options of Transformers that make it unpack a GGUF file's weights; none for other teachers.

    Versions that have kernels for a GPU would leave them in their blocks; those of before know no such option.
    """
    packed = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": packed(dequantize=True)} if is_gguf(name) and packed is not None else {}


def forget_packing(model: PreTrainedModel) -> None:
    """Let a model that was unpacked be what it is by now, plain weights: Transformers would refuse to save it."""
    unpacked: Any = model
    unpacked.hf_quantizer, unpacked.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def refuse_to_leave_packed(name: str) -> None:
    """Refuse a GGUF file where weights are to stay in the files that they came in.

    Raises:
        TeacherError: it is one.
    """
    if is_gguf(name):
        raise TeacherError(
            f"teacher {name!r} is a GGUF file, whose weights are unpacked into memory as they are read: they "
            "cannot be left on the disk, nor read in parts; leave --device-map or --tensor-parallel out, or give the "
            "folder of the model that the file was made of"
        )


def refuse_unread_scaling(name: str, config: PreTrainedConfig, revision: str | None) -> None:
    """Refuse a GGUF file that scales rotary positions where Transformers made a configuration without a scaling of it.

    What it reads of it depends on its version and the architecture. Without it the model is another one, and nothing
    would tell: Llama 3.1's comes as a tensor of factors, others as metadata.

    Raises:
        TeacherError: it is such a file.
    """
    if _scales_positions(getattr(config, "rope_parameters", None)):
        return
    from gguf import GGUFReader

    folder, located = locate(name)
    file = cached_file(folder, located["gguf_file"], revision=revision)
    assert file is not None, "the configuration was read from it"
    reader = GGUFReader(file)
    said = [tensor.name for tensor in reader.tensors if tensor.name in _ROTARY_FACTORS]
    scaling = {key: field.contents() for key, field in reader.fields.items() if ".rope.scal" in key}
    kinds = [value for key, value in scaling.items() if key.endswith(".type")]
    for key, value in scaling.items():
        # a factor alone scales linearly, and one of 1 nothing
        factor = key.endswith((".factor", ".scale_linear")) and kinds in ([], ["linear"]) and value not in (0, 1)
        if factor or (key.endswith(".type") and value not in ("none", "linear")):
            said.append(f"{key} = {value}")
    if said:
        raise TeacherError(
            f"teacher {name!r} scales its rotary positions ({', '.join(said)}), and Transformers "
            f"{transformers.__version__} does not read that from GGUF: the teacher would be another model; give the "
            "folder of the original (config.json, model.safetensors, tokenizer)"
        )


def _scales_positions(parameters: Any) -> bool:
    """Whether the rotary parameters of a configuration, or those of some kind of its layers, name a scaling."""
    if not isinstance(parameters, dict):
        return False
    return parameters.get("rope_type", "default") != "default" or any(map(_scales_positions, parameters.values()))


def cannot_unpack(name: str, error: Exception) -> TeacherError:
    """What to tell of a GGUF file that Transformers could not read."""
    kind = "the file is there" if Path(name).is_file() else "no such file, and no hub id with a file"
    return TeacherError(
        f"teacher {name!r} cannot be unpacked from GGUF ({kind}): {why_unreadable(error)}\nThere is nothing to distil "
        "from without its weights; Transformers knows some architectures and number types only: give another file of "
        "the model, such as its Q8_0 or F16, or the folder of the original (config.json, model.safetensors, tokenizer)"
    )


def files_in(name: str) -> list[str]:
    """The GGUF files of a folder that is no Hugging Face model itself, in order."""
    folder = Path(name)
    if not name or not folder.is_dir() or (folder / "config.json").exists():
        return []
    return sorted(str(path) for path in folder.iterdir() if is_gguf(path.name))
