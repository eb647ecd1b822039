"""The generate tab: a prompt, a rack of LoRAs, settings, and a gallery of what came of them."""

import random
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from threading import Event
from typing import Any

import gradio as gr

from sdlora.generation.job import SCHEDULERS, Job, parse_size
from sdlora.generation.prompts.tags import resolved
from sdlora.generation.render import Picture, render
from sdlora.web import compare, equalise, markup, outcome, rack
from sdlora.web.events import QUIET, toasted, warned
from sdlora.web.outcome import KEPT, Outcome, Shot
from sdlora.web.studio import Studio

SCHEDULER_NAMES = [("the model's own", "default"), *((told[2], name) for name, told in SCHEDULERS.items())]


@dataclass(frozen=True, eq=False)
class Form:
    """The widgets that a job is made of."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    rack: rack.Rack
    compare: compare.Compare
    model: gr.Dropdown
    seed: gr.Number
    random_seed: gr.Checkbox
    steps: gr.Slider
    guidance_scale: gr.Slider
    scheduler: gr.Dropdown
    size: gr.Textbox
    count: gr.Slider

    @property
    def inputs(self) -> set[Any]:
        """What `job` wants the values of."""
        own = {widget for name, widget in vars(self).items() if name not in ("rack", "compare")}
        return own | self.rack.inputs

    def job(self, values: Mapping[Any, Any]) -> Job:
        """The job that the widgets' values describe, the prompt's LoRA tags among its LoRAs.

        SdloraError for values that make none.
        """
        library = self.rack.studio.library
        width, height = parse_size(values[self.size]) if values[self.size] else (None, None)
        job = Job(
            prompt=values[self.prompt] or "",
            negative_prompt=values[self.negative_prompt] or "",
            model=values[self.model],
            **self.rack.settings(values),
            seed=random.randrange(2**32) if values[self.random_seed] else values[self.seed],
            steps=values[self.steps],
            guidance_scale=values[self.guidance_scale],
            scheduler=values[self.scheduler],
            width=width,
            height=height,
            count=values[self.count],
        )
        with warned():
            library.scan()
        return resolved(job, library.names, library.presets)


@dataclass(frozen=True, eq=False)
class Buttons:
    """What starts a job, and what stops it."""

    generate: gr.Button
    compare: gr.Button
    cancel: gr.Button

    def running(self, now: bool) -> dict[Any, Any]:
        """How they are seen while a job runs, and else."""
        return {button: gr.Button(visible=(button is self.cancel) == now) for button in vars(self).values()}


def build(studio: Studio, page: gr.Blocks) -> None:
    """Lay the tab out and wire it up."""
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=320):
            form, buttons, bar = _form(studio)
        with gr.Column(scale=6, min_width=320, elem_classes="outcome"):
            shown = outcome.build(bar)
    _wire(studio, page, form, buttons, shown)


def _form(studio: Studio) -> tuple[Form, Buttons, gr.HTML]:
    prompt = gr.Textbox(
        "a red cat in a meadow", label="Prompt", lines=2, max_length=4000, elem_id="prompt",
        placeholder="what to paint; <lora:name:0.8>, (word:1.2) and [from:to:0.5] are understood",
    )  # fmt: skip
    negative_prompt = gr.Textbox("", label="Negative prompt", lines=1, max_length=4000, elem_id="negative")
    with gr.Row(elem_classes="go-row"):
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
    bar = gr.HTML(markup.note("Ready."), elem_id="bar")
    model = gr.Dropdown(list(studio.models), value=studio.models[0], label="Model", render=False)
    gr.HTML('<h2 class="section">LoRAs</h2>')
    shelf = rack.build(studio, model)
    equalise.build(shelf)
    side_by_side = compare.build(shelf)
    gr.HTML('<h2 class="section">Settings</h2>')
    with gr.Group():
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
            random_seed = gr.Checkbox(False, label="random seed", min_width=120, elem_id="random-seed")
        with gr.Row():
            steps = _slider("Steps", 1, 100, 20, 1)
            guidance = _slider("Guidance scale", 1, 20, 5.0, 0.5)
        with gr.Row():
            size = gr.Textbox("", label="Size", placeholder="own, or 512x768", max_length=20, min_width=140)
            count = _slider("Pictures", 1, 8, 1, 1)
        with gr.Row():
            scheduler = gr.Dropdown(SCHEDULER_NAMES, value="default", label="Scheduler", min_width=140)
            model.render()
    form = Form(
        prompt, negative_prompt, shelf, side_by_side, model, seed, random_seed, steps, guidance, scheduler, size, count
    )  # fmt: skip
    return form, Buttons(go, side_by_side.go, stop), bar


def _slider(label: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    name = label.lower().replace(" ", "-")
    return gr.Slider(low, high, value=value, step=step, label=label, min_width=140, buttons=[], elem_id=name)


def _wire(studio: Studio, page: gr.Blocks, form: Form, buttons: Buttons, shown: Outcome) -> None:
    def run(side_by_side: bool, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        with toasted(), studio.job_of(str(request.session_hash)) as asked:
            yield buttons.running(True)
            try:
                yield from _run(studio, form, shown, values, asked, side_by_side)
            except Exception:  # whatever it is, the page must be able to go on; gradio shows or logs it
                yield {**buttons.running(False), shown.bar: markup.note("Ready.")}
                raise
            yield buttons.running(False)

    def generate(values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from run(False, values, request)

    def side_by_side(values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from run(True, values, request)

    def cancel(request: gr.Request) -> None:
        studio.cancel(str(request.session_hash))

    inputs, results = form.inputs | {shown.shots}, [*vars(buttons).values(), *vars(shown).values(), form.seed]
    compared = inputs | form.compare.inputs
    job: dict[str, Any] = {"concurrency_limit": 16, "trigger_mode": "once", **QUIET}
    gr.on([buttons.generate.click, form.prompt.submit], generate, inputs, results, **job)
    buttons.compare.click(side_by_side, compared, results, **job)
    buttons.cancel.click(cancel, None, None, queue=False, **QUIET)
    page.unload(cancel)
    rows = form.rack.rows
    seen = [getattr(row, name) for name in ("lora", "preset", "words") for row in rows]
    page.load(lambda: rack.on_load(form.rack), None, seen, **QUIET)


def _run(
    studio: Studio, form: Form, shown: Outcome, values: Mapping[Any, Any], asked: Event, side_by_side: bool
) -> Iterator[dict[Any, Any]]:
    """One job of one page, or the comparison made of it, until it is asked to stop: yields what changes in widgets."""
    yield {shown.bar: markup.bar(0, f"loading {values[form.model]}")}
    job = form.job(values)
    comparison = form.compare.comparison(values, job, form.rack) if side_by_side else None
    jobs = comparison.jobs if comparison else (job,)
    total = sum(one.count for one in jobs)
    yield {form.seed: job.seed}
    mixer, notes = studio.mixer(job.model), ""
    shots: tuple[Shot, ...] = values[shown.shots]
    done: list[Picture] = []
    with closing(render(mixer, *jobs)) as events:
        for event in events:
            if isinstance(event, Picture):
                notes = outcome.notes(mixer, event.job)
                done.append(event)
                shots = shown.added(studio, shots, done, comparison)
                yield shown.filled(shots[:KEPT])
            else:
                yield {shown.bar: outcome.bar(event, total)}
            if asked.is_set():
                break
    cancelled = asked.is_set() and len(done) < total
    told = f"Cancelled after {_pictures(len(done))}." if cancelled else f"{_pictures(len(done))} done."
    yield {shown.bar: markup.note(f"{told} {notes}".rstrip())}


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
