"""Loading a base model: toybox, a diffusers folder, a single .safetensors file or a hub id."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from sdlora import toybox
from sdlora.errors import SdloraError
from sdlora.models.families import family_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PARTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
}
PARTS["StableDiffusionXLPipeline"] = (*PARTS["StableDiffusionPipeline"], "text_encoder_2", "tokenizer_2")
# What a part's folder must hold, any one of these sets; without, diffusers would go on with defaults.
FILES = {"tokenizer": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}), "scheduler": ({"scheduler_config.json"},)}
MODULE_FILES = ({"config.json"},)
BROKEN = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The diffusers pipeline of a base model, ready to generate; SdloraError where it cannot be had."""
    _quiet()
    path = find(model)
    if path is None:
        pipeline = _from_hub(model, dtype)
    else:
        pipeline = _from_folder(path, dtype) if path.is_dir() else _from_file(path, dtype)
    family_of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    _refuse_holes(path or model, pipeline)
    try:
        return pipeline.to(device)
    except RuntimeError as error:
        raise SdloraError(f"{model} does not go onto {device} ({_first_line(error)}); free memory there") from error


def find(model: str) -> Path | None:
    """Where a base model lies on this machine, None for a hub id; SdloraError for what can be neither."""
    path = toybox.path() if model == "toybox" else Path(os.path.expanduser(model))
    if os.path.exists(path):
        return path
    if model == "toybox" or not HUB_ID.fullmatch(model):
        raise SdloraError(
            f"no model at {path}; give toybox, a diffusers folder, a .safetensors file or a hub id (owner/name)"
        )
    return None


def source_of(pipeline: Any, model: str = "") -> Path | None:
    """Where the weights of a pipeline lie: the folder or file of the model, None where that is not known.

    model: its name as `load_pipeline` takes it; without, and for models of the hub, diffusers remembers the folder.
    """
    try:
        path = find(model) if model else None
    except SdloraError:  # a name of one's own for a model at hand
        path = None
    if path is None:
        told = getattr(pipeline.unet.config, "_name_or_path", None)
        path = Path(told).parent if told and os.path.isdir(told) and Path(told).name == "unet" else None
    return path


def _quiet() -> None:
    """What goes wrong is said by us, once; the libraries' own bars and warnings would only bury it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # diffusers 0.42 renames torch_dtype, older ones know no other name.
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise SdloraError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
    try:
        kind = str(json.loads(index.read_text("utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SdloraError(f"{index} is damaged ({error!r}); restore it from where the model came from") from error
    missing = [part for part in PARTS.get(kind, ()) if not _is_there(folder, part)]
    if missing:
        raise SdloraError(f"{folder} lacks {', '.join(missing)}; copy the whole model folder again")
    return _load(str(folder), kind, dtype, f"{folder} cannot be loaded")


def _is_there(folder: Path, part: str) -> bool:
    files = {file.name for file in folder.joinpath(part).glob("*")}
    return any(wanted <= files for wanted in FILES.get(part.removesuffix("_2"), MODULE_FILES))


def _from_hub(name: str, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline

    try:
        kind = dict(DiffusionPipeline.load_config(name))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise SdloraError(
            f"{name} is neither a folder here nor to be had from the hub ({_first_line(error)}); "
            "check the name and the connection, or give a folder"
        ) from error
    return _load(name, kind, dtype, f"{name} cannot be loaded from the hub")


def _load(source: str, kind: str, dtype: torch.dtype, complaint: str) -> Any:
    """diffusers' own loading; weights in pickles are refused, the safety checker stays out."""
    from diffusers import DiffusionPipeline

    if kind not in PARTS:
        raise SdloraError(f"{source} is a {kind}; sdlora works with {' and '.join(PARTS)} models")
    given: dict[str, Any] = {"safety_checker": None, "feature_extractor": None} if "XL" not in kind else {}
    try:
        given |= {part: _text_encoder(source, part, dtype) for part in PARTS[kind] if part.startswith("text_encoder")}
        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **given)
    except BROKEN as error:
        raise SdloraError(
            f"{complaint} ({_first_line(error)}); all its parts must be whole, their weights .safetensors files"
        ) from error


def _text_encoder(source: str, part: str, dtype: torch.dtype) -> Any:
    """Loaded by itself, since transformers fills what the file lacks with random numbers and tells only who asks."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    loaded: Any = encoder.from_pretrained(
        source, subfolder=part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    module, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not name.endswith("position_ids"))
    if missing:
        raise ValueError(f"{part} lacks {len(missing)} weights such as {missing[0]}")
    return module


def _refuse_holes(source: Path | str, pipeline: Any) -> None:
    """diffusers leaves a weight that its file lacks without storage."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, part in parts.items():
        holes = [key for key, weight in part.named_parameters() if weight.is_meta]
        if holes:
            raise SdloraError(
                f"{source} is not whole: its {name} lacks {len(holes)} weights such as {holes[0]}; copy it again"
            )


def _from_file(file: Path, dtype: torch.dtype) -> Any:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    if file.suffix.lower() in PICKLES:
        raise SdloraError(f"{file} is a pickle, which can run code when it is opened; give a .safetensors file")
    try:
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
    except (SafetensorError, OSError) as error:
        raise SdloraError(f"{file} is no whole .safetensors file ({_first_line(error)}); fetch it again") from error
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise SdloraError(f"{file} is no Stable Diffusion checkpoint (no model.diffusion_model.*); is it a LoRA?")
    xl = any(key.startswith("conditioner.embedders.1.") for key in keys)
    pipeline_class = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    try:
        return pipeline_class.from_single_file(str(file), torch_dtype=dtype, safety_checker=None)
    except BROKEN as error:
        raise SdloraError(
            f"{file} cannot be loaded ({_first_line(error)}); "
            "single files need the model's configs from the hub once: connect, or give a diffusers folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
