"""The modules that can be changed, by their paths, and which of them presets and patterns name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sdlora.errors import SdloraError, nearest

WRAPPABLE = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Preset:
    """Modules whose path ends in one of the patterns and that are of one of the kinds."""

    patterns: tuple[str, ...]
    kinds: tuple[type[nn.Module], ...] = WRAPPABLE


# diffusers spells attention to_q ... and feed-forward ff.net, transformers' text encoders q_proj ... and mlp.
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2")

TARGETS: Mapping[str, Preset] = {
    "attention": Preset(_ATTENTION),
    "attention+ff": Preset(_ATTENTION + _FEED_FORWARD),
    "linear": Preset(("*",), (nn.Linear,)),
    "all": Preset(("*",)),
}


def modules_of(components: Mapping[str, nn.Module], kinds: tuple[type[nn.Module], ...] = WRAPPABLE) -> dict[str, Any]:
    """Every Linear and Conv2d, or every module of the `kinds`, by its path ("unet.mid_block...to_q"), in their order.

    CLIP's paths keep the level text_model, as every LoRA file spells them, though transformers 5 has dropped it.
    """
    return {
        f"{component}.{_dropped_level(root)}{name}": module
        for component, root in components.items()
        for name, module in root.named_modules()
        if name and isinstance(module, kinds)
    }


def shape_of(module: Any, attribute: str) -> tuple[int, ...]:
    """The true shape of a module's weight or bias, which may be packed (4 bits) or lie elsewhere (meta).

    A bias that the module does not have would have one value for each output.
    """
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (module.out_features, module.in_features)
    elif isinstance(module, nn.Conv2d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    else:
        shape = tuple(module.weight.shape)
    return shape[:1] if attribute == "bias" else shape


def select(components: Mapping[str, nn.Module], targets: str | Sequence[str]) -> list[str]:
    """Paths of the Linear and Conv2d modules that `targets` names, in the model's order (see `modules_of`).

    targets: names of TARGETS and patterns (fnmatch: *, ?, [..]), one or several. A pattern is held against the whole
    path and against its end: "to_q", "unet.mid_block.*", "unet.*.attn2.to_k". None may match nothing: SdloraError.
    """
    modules = modules_of(components)
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names:
        raise SdloraError(f"no targets given; name a preset ({', '.join(TARGETS)}) or patterns")
    chosen = {path for name in names for path in _matching(name, modules)}
    return [path for path in modules if path in chosen]


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """The paths that a pattern matches as a whole or in their end; none raises SdloraError with the nearest names."""
    paths = list(paths)
    matches = [path for path in paths if fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")]
    if not matches:
        raise SdloraError(_unmatched(pattern, paths))
    return matches


def _dropped_level(root: nn.Module) -> str:
    children = {name for name, _ in root.named_children()}
    return "text_model." if {"embeddings", "encoder", "final_layer_norm"} <= children else ""


def _matching(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    if name not in TARGETS:
        return matching(name, modules)
    preset = TARGETS[name]
    paths = [path for path, module in modules.items() if isinstance(module, preset.kinds)]
    # A preset lists the spellings of several libraries, so only all of them together must match something.
    matches = [path for path in paths if any(fnmatchcase(path, f"*.{pattern}") for pattern in preset.patterns)]
    if not matches:
        raise SdloraError(_unmatched(name, modules))
    return matches


def _unmatched(pattern: str, paths: Iterable[str]) -> str:
    """The error line. Nearness is judged on what follows the last star, against every end of every path."""
    paths = list(paths)
    components = ", ".join(dict.fromkeys(path.partition(".")[0] for path in paths)) or "the model"
    ends = {".".join(parts[start:]) for parts in (path.split(".") for path in paths) for start in range(len(parts))}
    tail = pattern.rpartition("*")[2].strip(".") or pattern
    hint = nearest(tail, [*TARGETS, *sorted(ends)])
    return f"target {pattern!r} matches no Linear or Conv2d in {components}{hint}; presets: {', '.join(TARGETS)}"
