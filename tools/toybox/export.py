"""Writes toybox as a diffusers StableDiffusionPipeline folder in float16 safetensors.

python -m tools.toybox.export --work outputs/toybox --output sdlora/toybox/model
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from tools.toybox import vae
from tools.toybox.base import Base, build_scheduler


def export(work: Path, output: Path) -> None:
    words = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=77)
    model = Base(words)
    model.load_state_dict(torch.load(work / "base.pt", weights_only=True)["average"])
    autoencoder = vae.build()
    autoencoder.load_state_dict(torch.load(work / "vae_final.pt", weights_only=True))
    autoencoder.register_to_config(scaling_factor=1.0)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=words,
        unet=model.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(output, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # what tokenizer.json is made from, for older versions of transformers
        (output / "tokenizer" / name).write_text((work / "tokenizer" / name).read_text())
    forget_paths(output)
    spell_out(output / "text_encoder" / "model.safetensors")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size / 1e6:.1f} MB")


def spell_out(file: Path) -> None:
    """Text encoders' keys begin with text_model, as transformers before 5 wants them and newer ones read them too."""
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def forget_paths(folder: Path) -> None:
    """Takes the building machine's paths out of the saved configs."""
    for file in folder.rglob("*.json"):
        config = json.loads(file.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--work", type=Path, default=Path("outputs/toybox"))
    arguments.add_argument("--output", type=Path, default=Path("sdlora/toybox/model"))
    options = arguments.parse_args()
    export(options.work, options.output)


if __name__ == "__main__":
    main()
