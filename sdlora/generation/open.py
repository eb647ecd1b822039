"""Opening a base model for generation."""

import torch

from sdlora.mixing.mixer import Mixer
from sdlora.models.load import load_pipeline


def open_mixer(model: str) -> Mixer:
    """A mixer over the base model: in float16 on the GPU where there is one, in float32 on the CPU elsewhere.

    SdloraError: there is no such model, or it lacks a part.
    """
    if torch.cuda.is_available():
        return Mixer(load_pipeline(model, dtype=torch.float16, device="cuda"), model)
    return Mixer(load_pipeline(model), model)
