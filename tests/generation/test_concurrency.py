"""Many threads, one pipeline: jobs run whole, one after another, and a cancelled one leaves nothing behind."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.write import write
from sdlora.generation.job import Job, LoraWeight
from sdlora.generation.open import open_mixer
from sdlora.generation.render import Picture, Progress, render
from sdlora.lowrank.adapter import Adapter
from sdlora.mixing.mixer import Mixer
from sdlora.mixing.plan import Plan
from sdlora.mixing.schedule import parse_schedule
from sdlora.models.families import components_of
from tests.conftest import random_adapter
from tests.mixing.states import same_state, state_of

THREADS, JOBS = 8, 50
CHANGES: tuple[Callable[[Mixer, Path], object], ...] = (
    lambda mixer, file: mixer.load(file, name="c"),
    lambda mixer, file: mixer.add(Adapter({}), "d"),
    lambda mixer, file: mixer.set({}),
    lambda mixer, file: mixer.apply(),
    lambda mixer, file: mixer.apply(Plan(mixer.model)),
    lambda mixer, file: mixer.unload("b"),
    lambda mixer, file: mixer.hold(),
)


@pytest.fixture(scope="module")
def mixer() -> Mixer:
    return open_mixer("toybox")


@pytest.fixture(scope="module")
def files(mixer: Mixer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Small LoRAs of noticeable effect on the UNet and the text encoder."""
    folder, made = tmp_path_factory.mktemp("loras"), []
    for seed, suffix in enumerate(("attn2.to_q", "attn1.to_v", "q_proj", "ff.net.2")):
        adapter = random_adapter(components_of(mixer.pipeline), seed, suffix=suffix)
        made.append(folder / f"{seed}.safetensors")
        write(Adapter(adapter.deltas), made[-1], "kohya")
    return made


def job_of(rng: random.Random, files: list[Path]) -> Job:
    """A short job over a small picture, with a plan of its own."""
    loras = tuple(
        LoraWeight(
            path=str(file),
            unet=rng.uniform(-1, 1),
            text_encoder=rng.choice([0.0, 0.5]),
            schedule=parse_schedule(rng.choice(["", "", "0.5-"])),
        )
        for file in rng.sample(files, rng.randrange(4))
    )
    prompt = rng.choice(["a red cat", "a (blue:1.3) boat", "[a dog|a house] in the snow"])
    return Job(prompt=prompt, loras=loras, seed=rng.randrange(5), steps=rng.choice([1, 3]), width=32, height=32)


def bits_of(mixer: Mixer, job: Job) -> bytes:
    return next(event.image.tobytes() for event in render(mixer, job) if isinstance(event, Picture))


def cancelled(mixer: Mixer, job: Job, after: int) -> None:
    """Let go of a job after some steps."""
    with closing(render(mixer, replace(job, steps=3))) as events:
        for event in events:
            if isinstance(event, Progress) and event.step >= after:
                return


def test_eight_threads_with_fifty_jobs_each_paint_what_each_job_paints_alone(mixer: Mixer, files: list[Path]):
    rng = random.Random(0)
    jobs = [job_of(rng, files) for _ in range(24)]
    before = state_of(mixer.pipeline)
    alone = [bits_of(open_mixer("toybox"), job) for job in jobs]
    assert len(set(alone)) > 20, "the jobs paint different pictures"

    def work(thread: int) -> list[int]:
        own, wrong = random.Random(thread), []
        for _ in range(JOBS):
            index = own.randrange(len(jobs))
            if own.random() < 0.1:
                cancelled(mixer, jobs[index], after=own.choice([1, 2]))
            elif bits_of(mixer, jobs[index]) != alone[index]:
                wrong.append(index)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert [wrong for found in pool.map(work, range(THREADS)) for wrong in found] == []
    mixer.hold()
    assert same_state(mixer.pipeline, before) and mixer.state == "base" and not mixer.lock.locked()


def test_a_cancelled_job_stops_within_one_step_and_the_next_one_is_right(mixer: Mixer, files: list[Path]):
    job = Job(prompt="a red cat", loras=(LoraWeight(path=str(files[0])),), steps=3, width=32, height=32)
    wanted, asked = bits_of(mixer, job), []
    hook = mixer.pipeline.unet.register_forward_hook(lambda *_: asked.append(1))
    try:
        for step in range(1, 4):
            asked.clear()
            cancelled(mixer, job, after=step)
            assert len(asked) == step and not mixer.lock.locked()
    finally:
        hook.remove()
    assert bits_of(mixer, job) == wanted


def test_nobody_changes_the_mix_while_a_job_or_another_thread_counts_on_it(mixer: Mixer, files: list[Path]):
    job = Job(prompt="a red cat", loras=(LoraWeight(path=str(files[0])),), steps=3, width=32, height=32)
    wanted = bits_of(mixer, job)
    mixer.load(files[1], name="b")

    def refused() -> None:
        before = mixer.names, mixer.plans
        for change in CHANGES:
            with pytest.raises(SdloraError, match="in use by a job"):
                change(mixer, files[2])
        assert (mixer.names, mixer.plans) == before

    events = render(mixer, job)
    next(events)
    refused()
    (picture,) = [event for event in events if isinstance(event, Picture)]
    assert picture.image.tobytes() == wanted
    mixer.load(files[1], name="b")
    with mixer.using(mixer.plan({"b": 1.0})), ThreadPoolExecutor(1) as other:
        other.submit(refused).result()
        for change in CHANGES:  # whoever uses it may
            change(mixer, files[2])
    mixer.hold()


def test_a_job_may_go_on_and_end_in_other_threads_than_it_began_in(mixer: Mixer, files: list[Path]):
    job = Job(prompt="a red cat", loras=(LoraWeight(path=str(files[0])),), steps=3, width=32, height=32)
    wanted = bits_of(mixer, job)

    def elsewhere(work: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(work).result()

    for ending in ("read", "closed"):
        events = render(mixer, job)
        for step in range(1, 4):
            assert elsewhere(lambda: next(events)) == Progress(0, step, 3)  # noqa: B023 at once
            for place in (elsewhere, lambda work: work()):
                with pytest.raises(SdloraError, match="in use by a job"):
                    place(lambda: mixer.set({}))
        if ending == "read":
            assert next(events).image.tobytes() == wanted
        elsewhere(events.close)
        assert not mixer.lock.locked()
    using = mixer.using(mixer.plan({str(files[0]): 0.5}))
    elsewhere(using.__enter__)
    elsewhere(lambda: using.__exit__(None, None, None))
    assert not mixer.lock.locked() and mixer.weights[str(files[0])]["unet"] == 1.0
    mixer.hold()


def test_a_change_is_whole_before_another_begins(mixer: Mixer, files: list[Path], monkeypatch: pytest.MonkeyPatch):
    read = mixer._shelf.read

    def asked(*args: Any) -> Any:
        with ThreadPoolExecutor(1) as pool, pytest.raises(SdloraError, match="in use by a job"):
            pool.submit(lambda: mixer.set({})).result()
        return read(*args)

    monkeypatch.setattr(mixer._shelf, "read", asked)
    mixer.load(files[0], name="a")
    mixer.unload("a")


def test_a_job_that_waits_says_so_and_can_be_cancelled_while_it_waits(mixer: Mixer):
    job = Job(prompt="a red cat", steps=3, width=32, height=32)
    running = render(mixer, job)
    assert next(running) == Progress(0, 1, 3)
    seen: list[Progress | Picture] = []

    def wait() -> None:
        with closing(render(mixer, job)) as events:
            seen.append(next(events))

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(10)
    assert seen == [Progress(0, 0, 3)] and mixer.lock.locked()
    assert sum(isinstance(event, Picture) for event in running) == 1
    assert not mixer.lock.locked()
