"""A mixer whose model has lost a module says so, and keeps nothing of it."""

import pytest
import torch
from torch import nn

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import Full
from sdlora.mixing.mixer import Mixer
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
FIRST, SECOND = (Adapter({f"unet.{ATTENTION}.{name}": Full(torch.eye(32))}) for name in ("to_k", "to_q"))


def mixer_that_lost_a_module(live: bool = False) -> Mixer:
    """What "q" was merged into is gone; "k" is merged as before."""
    pipeline = tiny_pipeline()
    mixer = Mixer(pipeline)
    mixer.add(FIRST, "k")
    mixer.add(SECOND, "q")
    mixer.apply(mixer.plan({"k": 1.0, "q": 1.0}), live=live)
    attention = pipeline.unet.get_submodule(ATTENTION)
    attention.to_q = nn.Linear(32, 32, bias=False)
    attention.to_q.load_state_dict(tiny_pipeline().unet.get_submodule(ATTENTION).to_q.state_dict())
    return mixer


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("weights", [{"k": 1.0, "q": 0.5}, {"k": 0.5, "q": 1.0}])
def test_a_mix_that_a_replaced_module_would_miss_is_refused_and_leaves_the_base(weights: dict[str, float], live: bool):
    mixer = mixer_that_lost_a_module(live)
    with pytest.raises(SdloraError, match=r"attn1\.to_q was replaced after the mixer was made; make a new mixer"):
        mixer.apply(mixer.plan(weights), live=live)
    assert mixer.state == "base" and not mixer._base.copied
    assert same_state(mixer.pipeline, state_of(tiny_pipeline()))
    mixer.set({"k": 1.0})
    assert mixer.state == "merged", "what is there can still be mixed"


@pytest.mark.parametrize("live", [False, True])
def test_taking_away_what_a_replaced_module_held_leaves_the_base(live: bool):
    mixer = mixer_that_lost_a_module(live)
    mixer.set({})
    assert mixer.state == "base" and not mixer._base.copied
    assert same_state(mixer.pipeline, state_of(tiny_pipeline()))


def test_another_mixer_goes_on_with_the_module_that_came():
    mixer = mixer_that_lost_a_module()
    mixer.hold()
    other = Mixer(mixer.pipeline)
    other.add(SECOND, "q")
    other.set({"q": 1.0})
    weight = mixer.pipeline.unet.get_submodule(ATTENTION).to_q.weight
    assert torch.equal(weight, tiny_pipeline().unet.get_submodule(ATTENTION).to_q.weight + torch.eye(32))
