"""The one module that learns: UNet and trained text encoders behind a single forward pass."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sdlora.models.families import Family


class Denoiser(nn.Module):
    """Noisy latents ▶ prediction.

    Everything trainable is called in one forward, so that DistributedDataParallel sees, and averages, every gradient.
    pipeline: lends the tokenizers when text encoders are trained.
    """

    def __init__(self, pipeline: Any, family: Family, text_encoders: Sequence[str] = ()) -> None:
        super().__init__()
        self.unet: nn.Module = pipeline.unet
        self.text_encoders = nn.ModuleDict({name: getattr(pipeline, name) for name in text_encoders})
        self.family = family
        self._pipeline = pipeline

    def forward(
        self, latents: Tensor, timesteps: Tensor, prompt: list[str] | Mapping[str, Tensor], sizes: Tensor
    ) -> Tensor:
        """latents: (n, channels, height, width); timesteps: (n,); prompt: n captions, or their cached conditioning.

        sizes: (n, 6), how each picture was cut, see `pictures.placement`.
        """
        # `unconditional` is `encode` but for empty captions, which dropout makes: they get what guidance will subtract.
        conditioning = self.family.unconditional(self._pipeline, prompt) if isinstance(prompt, list) else prompt
        return self.family.predict(self.unet, latents, timesteps, conditioning, sizes)
