"""Mixers over one model, and over pipelines that share parts of it: one has LoRAs at a time, and the base is kept."""

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError
from typing import Any
from weakref import ref

import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.generation.job import Job
from sdlora.generation.render import render
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.tokens import Vocabulary, own_vocabulary
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of
from tests.tiny import tiny_pipeline

TOKEN = Adapter({}, embeddings={"<s1>": {"text_encoder": torch.ones(1, 32)}})


def adapter(seed: int = 0) -> Adapter:
    return random_adapter(components_of(tiny_pipeline()), seed, suffix="to_q")


def twin_of(pipeline: Any, **others: Any) -> Any:
    """Diffusers' way to another pipeline over the same parts."""
    return type(pipeline)(**{**pipeline.components, **others}, requires_safety_checker=False)


def mix(mixer: Mixer) -> None:
    """Something merged, something live and a token."""
    mixer.add(adapter(), "a")
    mixer.add(adapter(1), "b")
    mixer.add(TOKEN, "token")
    mixer.set({"a": 1.0, "b": {"unet": 1.0, "schedule": "0.5-"}})


def bare(pipeline: Any) -> bool:
    modules = [module for part in components_of(pipeline).values() for module in part.modules()]
    return not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


CHANGES: tuple[Callable[[Mixer], object], ...] = (
    lambda mixer: mixer.add(adapter(1), "b"),
    lambda mixer: mixer.set({}),
    lambda mixer: mixer.apply(),
    lambda mixer: mixer.hold(),
)


@pytest.mark.parametrize("pipeline_of", [lambda pipeline: pipeline, twin_of])
def test_of_two_mixers_one_at_a_time_has_loras(pipeline_of: Callable[[Any], Any]):
    pipeline = tiny_pipeline()
    base, first, second = state_of(pipeline), Mixer(pipeline), Mixer(pipeline_of(pipeline))
    mix(second)
    mixed = state_of(second.pipeline)
    for change in CHANGES:
        with pytest.raises(SdloraError, match="another mixer has LoRAs"):
            change(first)
    with pytest.raises(SdloraError, match="another mixer has LoRAs"):
        Mixer(pipeline)
    assert same_state(second.pipeline, mixed) and first.names == ()
    second.hold()
    assert same_state(pipeline, base)
    mix(first)
    with pytest.raises(SdloraError, match="another mixer has LoRAs"):
        second.add(adapter(), "a")
    first.hold()
    assert same_state(pipeline, base) and same_state(second.pipeline, base) and bare(pipeline)


@pytest.mark.parametrize("late", [False, True])
def test_a_pipeline_finds_the_base_though_the_one_that_was_mixed_is_gone(late: bool):
    pipeline = tiny_pipeline()
    base, twin = state_of(pipeline), twin_of(pipeline)
    mixer = Mixer(pipeline)
    mix(mixer)
    twin = twin_of(pipeline) if late else twin  # with or without the tokenizer that has learned
    del mixer, pipeline
    gc.collect()
    assert not bare(twin), "what it did stays"
    other = Mixer(twin)
    assert same_state(twin, base) and bare(twin), "until another one begins"
    mix(other)
    other.hold()
    assert same_state(twin, base)


def test_a_pipeline_that_shares_a_text_encoder_keeps_its_own_tokenizer_and_what_that_has_learned():
    pipeline = tiny_pipeline()
    mixer = Mixer(pipeline)
    del mixer
    twin = twin_of(pipeline, tokenizer=copy.deepcopy(pipeline.tokenizer))
    twin.load_textual_inversion(torch.ones(32), token="<theirs>")
    own, base = twin.tokenizer, state_of(twin)
    mixer = Mixer(twin)
    assert twin.tokenizer is own and same_state(twin, base)
    mixer.add(TOKEN, "token")
    mixer.unload("token")
    assert twin.tokenizer is own and same_state(twin, base)


def test_a_tokenizer_of_one_s_own_stays_where_another_mixer_s_tokens_are_taken_away():
    pipeline = tiny_pipeline()
    own, base, mixer = copy.deepcopy(pipeline.tokenizer), state_of(pipeline), Mixer(pipeline)
    mixer.add(TOKEN, "token")
    twin = twin_of(pipeline, tokenizer=own)
    del mixer
    gc.collect()
    Mixer(twin)
    assert twin.tokenizer is own and same_state(pipeline, base)


def test_a_mixer_takes_up_again_what_another_left():
    pipeline = tiny_pipeline()
    base, first, second = state_of(pipeline), Mixer(pipeline), Mixer(twin_of(pipeline))
    mix(second)
    del second
    gc.collect()
    first.apply()
    assert same_state(pipeline, base) and bare(pipeline)


def test_a_part_that_two_pipelines_share_is_enough():
    pipeline, other = tiny_pipeline(), tiny_pipeline(seed=1)
    sharing, mixer = twin_of(other, text_encoder=pipeline.text_encoder), Mixer(pipeline)
    base = state_of(sharing)
    mixer.add(TOKEN, "token")
    with pytest.raises(SdloraError, match="another mixer has LoRAs"):
        Mixer(sharing)
    del mixer
    gc.collect()
    mix(Mixer(sharing))
    Mixer(pipeline).hold()
    assert same_state(sharing, base) and same_state(pipeline, state_of(tiny_pipeline()))


def test_no_model_is_kept_for_the_sake_of_what_was_done_to_it():
    pipeline = tiny_pipeline()
    mix(Mixer(pipeline))
    unet, encoder = pipeline.unet, pipeline.text_encoder
    gone = [ref(one) for one in (unet, unet.conv_in, pipeline)]
    del pipeline, unet
    gc.collect()
    assert [one() for one in gone] == [None, None, None]
    sharing = tiny_pipeline()
    sharing.text_encoder = encoder
    assert Mixer(sharing).state == "base" and same_state(sharing, state_of(tiny_pipeline()))


def test_of_two_mixers_that_begin_at_once_one_gets_the_model(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline()
    mixers, third = [Mixer(pipeline), Mixer(pipeline)], Mixer(pipeline)
    both = Barrier(2)

    def clear() -> None:
        """Both find that the model is free, if they can."""
        with suppress(BrokenBarrierError):
            both.wait(0.5)

    def begun(mixer: Mixer) -> bool:
        try:
            mixer.add(TOKEN, "token")
        except SdloraError as error:
            return "another mixer has LoRAs" not in str(error)
        return True

    monkeypatch.setattr(third._live, "clear", clear)
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(begun, mixers)) == [False, True]


def test_nobody_begins_while_another_mixer_reads_the_base(monkeypatch: pytest.MonkeyPatch):
    pipeline = tiny_pipeline()
    base, first = state_of(pipeline), Mixer(pipeline)

    def read(*args: Any) -> Vocabulary:
        with pytest.raises(SdloraError, match="or is in use"):
            first.add(TOKEN, "token")
        return own_vocabulary(*args)

    monkeypatch.setattr("sdlora.mixing.mixer.own_vocabulary", read)
    second = Mixer(pipeline)
    mix(second)
    second.hold()
    assert same_state(pipeline, base)


def test_a_mixer_at_work_is_not_disturbed_by_another():
    mixer = Mixer(tiny_pipeline())
    events = render(mixer, Job(prompt="a red cat", steps=2, width=32, height=32))
    next(events)
    with pytest.raises(SdloraError, match="or is in use"):
        Mixer(mixer.pipeline)
    events.close()
    assert Mixer(mixer.pipeline).state == "base"
