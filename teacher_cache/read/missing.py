"""What a cache lacks of what is asked for, and the commands that add it. Nothing is read here.

In: a request, the manifest, and where the cache lies. Out: nothing, or a refusal that names every target that is not
there. A finished store takes more targets from the command that built it, so only what it lacks has to be named. Masked
views come with the first target that is taken from them.
"""

from __future__ import annotations

from collections.abc import Callable

from teacher_cache.codecs.nmse import Transform
from teacher_cache.contract.batch import TargetRequest
from teacher_cache.contract.manifest import Manifest
from teacher_cache.contract.targets import describe_targets
from teacher_cache.errors import TargetsError


def check_request(request: TargetRequest, manifest: Manifest, where: str, *, several: bool = False) -> None:
    """Check that the store at `where`, or each of several that hold the same targets, holds what is asked for.

    Raises:
        TargetsError: it does not.
    """
    targets = manifest.targets
    lacking = _lacking(request, manifest)
    if lacking == TargetRequest():
        return
    names = [f"hidden {layer}" for layer in lacking.hidden_layers]
    names += [f"attention {layer}" for layer in lacking.attention_layers]
    names += ["logits"] if lacking.logits else []
    names += ["masked views"] if lacking.masked else []
    if lacking.masked and manifest.teacher.causal:
        raise TargetsError(
            f"{where!r} comes from the causal LM {manifest.teacher.name!r}, which reads rows as they are: there are no "
            "masked words to learn; use --method lm or od, or a cache of a masked LM"
        )
    if lacking.next_tokens:
        raise TargetsError(
            f"{where!r} comes from the masked LM {manifest.teacher.name!r}: its rows have no next tokens to learn; use "
            "--method mlm or od, or a cache of a causal teacher"
        )
    raise TargetsError(
        f"{where!r} {'lack' if several else 'lacks'} {', '.join(names)}: the student would have nothing to learn from. "
        f"{'They have' if several else 'It has'} {', '.join(describe_targets(targets)) or 'no targets'}; "
        f"{_advice(lacking, manifest, several)}"
    )


def _lacking(request: TargetRequest, manifest: Manifest) -> TargetRequest:
    targets = manifest.targets
    return TargetRequest(
        hidden_layers=tuple(sorted(set(request.hidden_layers) - set(targets.hidden_layers()))),
        attention_layers=tuple(sorted(set(request.attention_layers) - set(targets.attention_layers()))),
        logits=request.logits and targets.logits is None,
        masked=request.masked and "masked" not in targets.views(),
        next_tokens=request.next_tokens and manifest.positions is None,
    )


def without_weights(manifest: Manifest, where: str) -> str | None:
    """Why nothing can be had from the teacher of a store itself; None where the store holds all of it."""
    if manifest.imported is None:
        return None
    return (
        f"{where!r} was imported ({manifest.imported}): the targets were computed elsewhere, and the weights of the "
        f"teacher {manifest.teacher.name!r} are not in the store"
    )


def _advice(lacking: TargetRequest, manifest: Manifest, several: bool) -> str:
    if manifest.imported is not None:
        return (
            f"it was imported ({manifest.imported}), and other targets cannot be added without the teacher: import "
            "files that hold them into another store, or ask for what is there"
        )
    if lacking.logits and not manifest.teacher.has_mlm_head:
        return (
            f"no store of the teacher {manifest.teacher.name!r} can have logits, because its checkpoint has no "
            "language-modelling head: leave them out, or build a store of a teacher that has one"
        )
    flags = _flags(lacking, manifest)
    if flags is None:
        return (
            "no target is left that could bring masked views with it: build another store, with --hs-view masked, or "
            "ask for what is there"
        )
    commands = ", then ".join(f"`{each}`" for each in flags)
    return (
        f"repeat the command that built {'each of them' if several else 'it'} with {commands}, which adds what is "
        "lacking and keeps what is there, or ask for what is there"
    )


def _flags(lacking: TargetRequest, manifest: Manifest) -> list[str] | None:
    """The flags of each build that it takes, one keeping the attention of one layer; None if no build can add it."""
    logits, flags = lacking.logits or (lacking.masked and manifest.teacher.has_mlm_head), []
    first, *others = lacking.attention_layers or (None,)
    wanted = {"logits": logits, "hidden": lacking.hidden_layers, "attention": lacking.attention_layers}
    if any(wanted.values()):
        flags = ["--targets " + ",".join(name for name, value in wanted.items() if value)]
    if lacking.hidden_layers:
        flags.append("--layers " + ",".join(map(str, lacking.hidden_layers)))
    if first is not None:
        flags.append(f"--attention-layer {first}")
    builds = [" ".join(flags)] if flags else []
    builds += [f"--targets attention --attention-layer {layer}" for layer in others]
    if lacking.masked and not logits:
        target = _target_to_mask(lacking, manifest)
        return None if target is None else [*builds, f"{target} --hs-view masked"]
    return builds


def _target_to_mask(lacking: TargetRequest, manifest: Manifest) -> str | None:
    """Flags of a target that the store neither has nor is to get, so that it can still be taken from masked views."""
    targets, layers = manifest.targets, range(1, manifest.teacher.layers + 1)
    for name, taken in (
        ("hidden --layers", {*targets.hidden_layers(), *lacking.hidden_layers}),
        ("attention --attention-layer", {*targets.attention_layers(), *lacking.attention_layers}),
    ):
        layer = next((layer for layer in layers if layer not in taken), None)
        if layer is not None:
            return f"--targets {name} {layer}"
    return None


def check_rotated(request: TargetRequest, rotation: Callable[[int], Transform | None], where: str) -> None:
    """Check that a store, or all of several alike, has a rotation for every layer that is asked for in one.

    Raises:
        TargetsError: it has none.
    """
    for layer in request.rotated_layers:
        if rotation(layer) is None:
            raise TargetsError(
                f"hidden state {layer!r} of {where!r} has no rotated coordinates to be read in: it is not coded in its "
                "principal components, or each of several stores has others; leave it out of `rotated_layers`"
            )
