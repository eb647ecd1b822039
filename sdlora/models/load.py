"""Loading a base model: toybox, a diffusers folder, a single .safetensors file or a hub id."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdlora import toybox
from sdlora.errors import SdloraError
from sdlora.models.families import family_of

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PARTS: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
}
PARTS["StableDiffusionXLPipeline"] = (*PARTS["StableDiffusionPipeline"], "text_encoder_2", "tokenizer_2")


def load_pipeline(model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """The diffusers pipeline of a base model, ready to generate; SdloraError where it cannot be had."""
    _quiet()
    path = toybox.path() if model == "toybox" else Path(model).expanduser()
    if path.is_dir():
        pipeline = _from_folder(path, dtype)
    elif path.is_file():
        pipeline = _from_file(path, dtype)
    elif model != "toybox" and HUB_ID.fullmatch(model):
        pipeline = _from_hub(model, dtype)
    else:
        raise SdloraError(
            f"no model at {path}; give toybox, a diffusers folder, a .safetensors file or a hub id (owner/name)"
        )
    family_of(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _quiet() -> None:
    """What goes wrong is said by us, once; the libraries' own bars and warnings would only bury it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # diffusers 0.42 renames torch_dtype, older ones know no other name.
    warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated", category=FutureWarning)
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise SdloraError(f"{folder} has no model_index.json; give the folder of a diffusers pipeline")
    try:
        kind = json.loads(index.read_text("utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise SdloraError(f"{index} is damaged ({error!r}); restore it from where the model came from") from error
    missing = [part for part in PARTS.get(kind, ()) if not any(folder.joinpath(part).glob("*"))]
    if missing:
        raise SdloraError(f"{folder} lacks {', '.join(missing)}; copy the whole model folder again")
    return _load(str(folder), kind, dtype, f"{folder} cannot be loaded")


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
    without = {"safety_checker": None, "feature_extractor": None} if kind == "StableDiffusionPipeline" else {}
    try:
        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **without)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise SdloraError(
            f"{complaint} ({_first_line(error)}); its weights must be whole .safetensors files"
        ) from error


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
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise SdloraError(
            f"{file} cannot be loaded ({_first_line(error)}); "
            "single files need the model's configs from the hub once: connect, or give a diffusers folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
