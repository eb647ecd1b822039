"""The optimiser table and the learning rate's course, against transformers and diffusers."""

import importlib.util

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from transformers.optimization import Adafactor

from sdlora.errors import SdloraError
from sdlora.training import config, optimizers
from sdlora.training.schedule import COURSES, factor

OWN = ("adamw", "adam", "sgd", "adafactor")
BORROWED = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def test_the_config_offers_exactly_what_there_is() -> None:
    assert config.OPTIMIZERS == tuple(optimizers.OPTIMIZERS)
    assert config.SCHEDULES == tuple(COURSES)


@pytest.mark.parametrize("name", OWN)
def test_each_optimiser_learns_with_each_components_rate(name: str) -> None:
    unet, text = (nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = optimizers.build(name, {"unet": ([unet], 1e-2), "text_encoder": ([text], 1e-3)}, 0.0)
    ((unet - 1).square().sum() + (text - 1).square().sum()).backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    assert float((unet / text).detach().mean()) == pytest.approx(10, rel=1e-4)


@pytest.mark.parametrize("name", BORROWED)
def test_a_missing_library_is_named(name: str) -> None:
    if importlib.util.find_spec(BORROWED[name]):
        pytest.skip(f"{BORROWED[name]} is installed")
    with pytest.raises(SdloraError, match=f"pip install {BORROWED[name]}"):
        optimizers.build(name, {"unet": ([nn.Parameter(torch.zeros(2))], 1.0)}, 0.0)


def test_an_unknown_optimiser_names_the_nearest() -> None:
    with pytest.raises(SdloraError, match="nearest: adamw"):
        optimizers.build("adamww", {}, 0.0)


def test_adafactor_takes_the_learning_rate_as_it_is() -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)) * 0.1
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pair = (
        optimizers.build("adafactor", {"unet": ([ours], 1e-3)}, 0.0),
        Adafactor([theirs], lr=1e-3, scale_parameter=False, relative_step=False),
    )
    for _ in range(5):
        for parameter, optimizer in zip((ours, theirs), pair, strict=True):
            optimizer.zero_grad()
            (parameter - 1).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", COURSES)
def test_the_course_of_the_learning_rate_is_diffusers(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(
        "constant_with_warmup" if name == "constant" else name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=50,
        num_cycles=4,
        power=2.0,
    )
    for step in range(50):
        assert factor(name, step, 50, warmup) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6), step
        optimizer.step()
        theirs.step()
