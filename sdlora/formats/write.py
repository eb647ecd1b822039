"""Writing LoRA files: whole or not at all, in names that other programs read."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.formats.architectures import Architecture, known
from sdlora.formats.atomic import replace_file
from sdlora.formats.names import NAMINGS, comfyui, kohya, original_unet
from sdlora.formats.sources import COMPONENTS, CONFIG, WEIGHTS
from sdlora.formats.spelled import BIAS, Tensors, embeddings_of, refuse, tensors_of
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Delta, DoRA, LowRank
from sdlora.lowrank.laws.delta import factors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALPHAS = "lora_adapter_metadata"  # where diffusers tells ranks and alphas of names that have no key for them
CLIP_H = 1024  # the width of SD 2.x's text encoder; none of CLIP-L's weights has a side of it
Files = Mapping[str, bytes]  # by the path within the folder; a single file has ""


def write(
    adapter: Adapter,
    path: Path | str,
    naming: str = "kohya",
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write an adapter, with its metadata, to a .safetensors file or, in PEFT's names, to a folder.

    naming: kohya, which its scripts, A1111, Forge and ComfyUI read: SDXL's UNet in the names of the original code, all
    that kohya's scripts know and that diffusers reads whole; SD 1.x and 2.x in diffusers' names, as kohya's scripts
    write them, the only ones that diffusers reads there. diffusers (0.42) mixes up alphas in kohya's names where
    modules have different ones: for it there is diffusers, whose alphas are in the metadata. comfyui: its own names of
    modules. peft: a folder with one of PEFT's for each component. The first two hold every law of LyCORIS but
    `set_weight` in kohya's; diffusers and peft hold LoRA, and DoRA with magnitudes of the outputs.
    dtype: of factors, float32, float16 or bfloat16. Alphas are float32 always.
    overwrite: put the folder in place of one that holds other things than a LoRA. Files are replaced anyway.
    SdloraError: nothing to write, an unknown naming, something the naming or dtype cannot hold, or a place that cannot
    be written to.
    """
    path = Path(path)
    if naming not in NAMINGS:
        raise SdloraError(f"unknown naming {naming!r}; it is one of {', '.join(NAMINGS)}")
    if dtype not in DTYPES:
        raise SdloraError(f"LoRAs cannot be written in {str(dtype)[6:]}; choose float32, float16 or bfloat16")
    if not (adapter.deltas or adapter.embeddings):
        raise SdloraError(f"nothing to write to {path}: the adapter is empty")
    files = _folder(adapter, dtype) if naming == "peft" else {"": _file(adapter, naming, dtype)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if naming == "peft":
            _replace_folder(path, files, overwrite)
        else:
            replace_file(path, lambda partial: partial.write_bytes(files[""]))
    except OSError as error:
        raise SdloraError(f"{path} cannot be written ({error.strerror or error}); name another place") from error


def _file(adapter: Adapter, naming: str, dtype: torch.dtype) -> bytes:
    names = _names(adapter, naming)
    tensors = _cast(tensors_of(adapter, names, naming) | embeddings_of(adapter), dtype)
    # Alphas are told once, or they would be applied twice.
    metadata = {name: text for name, text in adapter.metadata.items() if name != ALPHAS}
    if naming == "diffusers":
        components = _by_component(adapter)
        told = {f"{name}.{key}": value for name in components for key, value in _config(components[name]).items()}
        metadata[ALPHAS] = json.dumps(told, indent=2, sort_keys=True)
    return save(tensors, metadata | _summary(adapter, tensors))


def _names(adapter: Adapter, naming: str) -> dict[str, str]:
    paths = tuple(dict.fromkeys(parameter.removesuffix(BIAS) for parameter in adapter.deltas))
    if naming == "diffusers":
        return {path: path for path in paths}
    architecture = _architecture(adapter)
    original = original_unet((*architecture.shapes, *architecture.norms)) if architecture else {}
    if naming == "kohya":
        two = architecture is not None and architecture.name == "sdxl"
        return kohya(paths, two, original if two else None)
    odd = [path for path in paths if path.startswith("unet.") and path not in original]
    if odd:
        raise SdloraError(f"ComfyUI has no name for {odd[0]}: it is of no known architecture; choose kohya")
    wide = any(CLIP_H in delta.shape for path, delta in adapter.deltas.items() if path.startswith("text_encoder."))
    return comfyui(paths, original, "clip_h" if wide else "clip_l")


def _architecture(adapter: Adapter) -> Architecture | None:
    """The architecture that an adapter is for: by shapes, else by names alone; of several the one it says it is for."""
    names = {parameter.removesuffix(BIAS) for parameter in adapter.deltas}
    named = [one for one in known() if all(name in one.shapes or name in one.norms for name in names)]
    fitting = [one for one in named if all(_fits(one, path, delta) for path, delta in adapter.deltas.items())] or named
    if adapter.metadata.get("ss_base_model_version", "").startswith("sdxl"):
        fitting.sort(key=lambda one: one.name != "sdxl")
    return next(iter(fitting), None)


def _fits(architecture: Architecture, parameter: str, delta: Delta) -> bool:
    shape = architecture.shape_of(parameter)
    return shape is not None and delta.fits(shape)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
    """Factors in the dtype; alphas and other single numbers stay as they are."""
    cast: Tensors = {}
    storages = set()
    for key, tensor in tensors.items():
        value = tensor.detach().cpu()
        if value.dim() and value.dtype != dtype:
            value = value.float().to(dtype)
        if not torch.isfinite(value).all():
            raise SdloraError(f"{key} has values that {str(dtype)[6:]} cannot hold; choose bfloat16 or float32")
        value = value.contiguous()
        storage = value.untyped_storage().data_ptr()
        cast[key] = value.clone() if storage in storages else value  # no two keys of a file may share memory
        storages.add(storage)
    return cast


def _folder(adapter: Adapter, dtype: torch.dtype) -> dict[str, bytes]:
    """PEFT's two files for each component, in a folder of its name."""
    metadata = {name: text for name, text in adapter.metadata.items() if name != ALPHAS}
    files = {}
    for component, part in _by_component(adapter).items():
        names = {path: f"base_model.model.{_in_peft(path)}" for path in part.deltas}
        tensors = _cast(tensors_of(part, names, "peft"), dtype)
        files[f"{component}/{WEIGHTS}"] = save(tensors, metadata | _summary(part, tensors) | {"format": "pt"})
        files[f"{component}/{CONFIG}"] = json.dumps(_config(part), indent=2, sort_keys=True).encode()
    return files


def _in_peft(path: str) -> str:
    """The path within its component. transformers 5 has dropped the level text_model where there is no projection."""
    component, _, inner = path.partition(".")
    return inner.removeprefix("text_model.") if component == "text_encoder" else inner


def _by_component(adapter: Adapter) -> dict[str, Adapter]:
    refuse(adapter, "peft")  # as a whole, before the first part
    parts = {name: Adapter(adapter.component(name), adapter.metadata) for name in sorted(COMPONENTS, reverse=True)}
    return {name: part for name, part in parts.items() if part.deltas}


def _config(part: Adapter) -> dict[str, Any]:
    """PEFT's LoraConfig of one component: the commonest rank and alpha, and patterns for the modules that differ.

    Module names end as they are written here in every model: none is the end of another.
    """
    pairs = {path: delta.inner if isinstance(delta, DoRA) else delta for path, delta in part.deltas.items()}
    ranks = {_in_every(path): pair.rank for path, pair in pairs.items()}
    alphas = {_in_every(path): _number(pair.alpha) for path, pair in pairs.items() if isinstance(pair, LowRank)}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(isinstance(delta, DoRA) for delta in part.deltas.values()),
        "use_rslora": False,
        "bias": "none",
    }


def _in_every(path: str) -> str:
    """The path within its component, as far as all versions of transformers have it; PEFT compares ends of names."""
    return path.partition(".")[2].removeprefix("text_model.")


def _commonest(values: Mapping[str, Any]) -> Any:
    held = list(values.values())
    return max(dict.fromkeys(held), key=held.count)


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else float(value)


def _replace_folder(path: Path, files: Files, overwrite: bool) -> None:
    """Write a folder under another name and rename it: there is the old one or the new, no half."""
    if path.is_file() or path.suffix == ".safetensors":
        raise SdloraError(f"{path} is the name of a file, and PEFT's names are written as a folder; name a folder")
    if path.exists() and not (overwrite or _holds_adapter(path)):
        raise SdloraError(f"{path} holds other things than a LoRA; name another folder")
    partial, old = (path.with_name(f".{path.name}.{end}") for end in ("partial", "old"))
    for left in (partial, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            replace_file(partial / name, _writer(content))
        if path.exists():
            path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _writer(content: bytes) -> Callable[[Path], object]:
    return lambda partial: partial.write_bytes(content)


def _holds_adapter(folder: Path) -> bool:
    """Whether a folder is empty or holds what `write` puts there and nothing else."""
    wanted = {CONFIG, WEIGHTS}
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}
    return files <= wanted | {f"{component}/{name}" for component in COMPONENTS for name in wanted}


def _summary(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What other programs show of any LoRA: rank, alpha and the hash of all that follows the header."""
    inner = [delta.inner if isinstance(delta, DoRA) else delta for delta in adapter.deltas.values()]
    ranks = {delta.rank for delta in inner if delta.rank is not None}
    alphas = {float(delta.alpha) for delta in inner if hasattr(delta, "alpha")}
    plain = all(isinstance(delta, LowRank) and delta.mid is None for delta in inner)
    body = _after_header(save(dict(tensors)))
    return {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
    }


def _after_header(content: bytes) -> bytes:
    """A .safetensors file starts with the length of its header in 8 bytes."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def dtype_of(adapter: Adapter) -> torch.dtype:
    """The dtype that all factors share, if a LoRA can be written in it; else float32, which holds them all."""
    found = {factor.dtype for delta in adapter.deltas.values() for factor in factors(delta).values()}
    found |= {vectors.dtype for held in adapter.embeddings.values() for vectors in held.values()}
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else torch.float32
