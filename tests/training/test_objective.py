"""Noising, targets and weights against diffusers' own scheduler and the papers' definitions."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.training import objective

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS: Tensor = SCHEDULER.alphas_cumprod


@pytest.fixture
def sample() -> tuple[Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 6, generator=chance)
    return latents, noise, torch.tensor([0, 1, 250, 500, 998, 999])


def test_noising_and_velocity_are_the_schedulers(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    latents, noise, timesteps = sample
    expected = SCHEDULER.add_noise(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(objective.noised(latents, noise, ALPHAS, timesteps), expected, rtol=1e-6, atol=1e-6)
    velocity = SCHEDULER.get_velocity(latents, noise, timesteps)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(
        objective.target(latents, noise, ALPHAS, timesteps, "v_prediction"), velocity, rtol=1e-6, atol=1e-6
    )


def test_targets(sample: tuple[Tensor, Tensor, Tensor]) -> None:
    latents, noise, timesteps = sample
    assert objective.target(latents, noise, ALPHAS, timesteps, "epsilon") is noise
    assert objective.target(latents, noise, ALPHAS, timesteps, "sample") is latents
    with pytest.raises(SdloraError, match="'flow'.*epsilon"):
        objective.target(latents, noise, ALPHAS, timesteps, "flow")


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_weight_of_x0_however_the_model_predicts(
    sample: tuple[Tensor, Tensor, Tensor], gamma: float
) -> None:
    """One guess of x_0, spelled as ε, v and x_0: the weighted losses agree, and are min(SNR, γ) times the x_0 loss."""
    latents, noise, timesteps = (t.double() if t.is_floating_point() else t for t in sample)
    alphas = ALPHAS.double()
    guess = latents + 0.1 * torch.randn(latents.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noisy = objective.noised(latents, noise, alphas, timesteps)
    signal, spread = (a.sqrt()[timesteps].reshape(-1, 1, 1, 1) for a in (alphas, 1 - alphas))
    guessed_noise = (noisy - signal * guess) / spread
    snr = objective.snr(alphas, timesteps)
    expected = snr.clamp(max=gamma) * (guess - latents).square().flatten(1).mean(1)
    answers = {"sample": guess, "epsilon": guessed_noise, "v_prediction": signal * guessed_noise - spread * guess}
    for kind, answer in answers.items():
        target = objective.target(latents, noise, alphas, timesteps, kind)
        losses = (answer - target).square().flatten(1).mean(1)
        torch.testing.assert_close(losses * objective.min_snr_weight(snr, gamma, kind), expected)


def test_min_snr_at_zero_terminal_snr_is_finite() -> None:
    snr = torch.tensor([0.0, 1e-12, 1.0])
    assert objective.min_snr_weight(snr, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 1])
    assert objective.min_snr_weight(snr, 5.0, "v_prediction").tolist() == pytest.approx([0, 0, 0.5])


def test_losses_are_means_per_sample() -> None:
    prediction = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    assert objective.sample_losses(prediction, torch.zeros(2, 1, 2)).tolist() == [5.0, 0.0]
