"""What is trained: noising, target and loss weight. Tensors in, tensors out."""

import torch
from torch import Tensor

from sdlora.errors import SdloraError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def noised(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε, arXiv:2006.11239 equation 4.

    latents, noise: (n, channels, height, width); alphas_cumprod: ᾱ of every timestep; timesteps: (n,).
    """
    signal, spread = _amplitudes(latents, alphas_cumprod, timesteps)
    return signal * latents + spread * noise


def target(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, prediction_type: str) -> Tensor:
    """What the UNet should answer: ε, x_0, or v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) x_0 (arXiv:2202.00512, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return latents
    if prediction_type != "v_prediction":
        known = ", ".join(PREDICTION_TYPES)
        raise SdloraError(f"the model's scheduler has prediction type {prediction_type!r}; trained can be {known}")
    signal, spread = _amplitudes(latents, alphas_cumprod, timesteps)
    return signal * noise - spread * latents


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ / (1 - ᾱ) at each timestep, (n,)."""
    kept = alphas_cumprod[timesteps]
    return kept / (1 - kept)


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weight of each sample's loss, (n,), arXiv:2303.09556 section 3.4.

    min(SNR, γ) weighs the loss of x_0; expressed in ε that is min(SNR, γ) / SNR, in v it is min(SNR, γ) / (SNR + 1).
    At SNR 0 (zero terminal SNR) the weight for ε takes its limit, 1.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return torch.where(snr > 0, clipped / snr, 1.0)
    return clipped / (snr + 1) if prediction_type == "v_prediction" else clipped


def sample_losses(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (n,), in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def _amplitudes(like: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(ᾱ_t) and sqrt(1 - ᾱ_t), shaped to multiply `like`."""
    kept = alphas_cumprod[timesteps].reshape(-1, *[1] * (like.ndim - 1))
    return kept.sqrt(), (1 - kept).sqrt()
