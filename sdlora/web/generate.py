"""The generate tab: a prompt, a rack of LoRAs, settings, and a gallery of what came of them."""

import random
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from sdlora.generation.job import SCHEDULERS, Job, parse_size
from sdlora.generation.png import save
from sdlora.generation.render import Picture, Progress, render
from sdlora.web import markup, rack
from sdlora.web.studio import Studio
from sdlora.web.toast import toasted

KEPT = 64  # pictures in a page's gallery; all stay in the output folder
SCHEDULER_NAMES = [("the model's own", "default"), *((told[2], name) for name, told in SCHEDULERS.items())]


@dataclass(frozen=True)
class Shot:
    """A picture in the gallery: a copy that pages may fetch, its job, and its name in the output folder."""

    shown: str
    job: Job
    file: str


@dataclass(frozen=True, eq=False)
class Form:
    """The widgets that a job is made of."""

    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    rack: rack.Rack
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
        own = {widget for name, widget in vars(self).items() if name != "rack"}
        return own | self.rack.inputs

    def job(self, values: Mapping[Any, Any]) -> Job:
        """The job that the widgets' values describe; SdloraError for values that make none."""
        width, height = parse_size(values[self.size]) if values[self.size] else (None, None)
        return Job(
            prompt=values[self.prompt] or "",
            negative_prompt=values[self.negative_prompt] or "",
            model=values[self.model],
            loras=self.rack.loras(values),
            seed=random.randrange(2**32) if values[self.random_seed] else values[self.seed],
            steps=values[self.steps],
            guidance_scale=values[self.guidance_scale],
            scheduler=values[self.scheduler],
            width=width,
            height=height,
            count=values[self.count],
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """The widgets that show a job running and what it made."""

    go: gr.Button
    stop: gr.Button
    bar: gr.HTML
    gallery: gr.Gallery
    details: gr.HTML
    shots: gr.State


def build(studio: Studio, page: gr.Blocks) -> None:
    """Lay the tab out and wire it up."""
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=320):
            form, go, stop, bar = _form(studio)
        with gr.Column(scale=6, min_width=320, elem_classes="outcome"):
            gallery = gr.Gallery(
                label="Pictures", show_label=False, columns=2, object_fit="contain", height="auto", format="png",
                interactive=False, elem_id="gallery",
            )  # fmt: skip
            details = gr.HTML("", elem_id="details")
            outcome = Outcome(go, stop, bar, gallery, details, gr.State(()))
    _wire(studio, page, form, outcome)


def _form(studio: Studio) -> tuple[Form, gr.Button, gr.Button, gr.HTML]:
    prompt = gr.Textbox("a red cat in a meadow", label="Prompt", lines=2, max_length=4000, elem_id="prompt")
    negative_prompt = gr.Textbox("", label="Negative prompt", lines=1, max_length=4000, elem_id="negative")
    with gr.Row(elem_classes="go-row"):
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
    bar = gr.HTML(markup.note("Ready."), elem_id="bar")
    model = gr.Dropdown(list(studio.models), value=studio.models[0], label="Model", render=False)
    gr.HTML('<h2 class="section">LoRAs</h2>')
    shelf = rack.build(studio, model)
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
        prompt, negative_prompt, shelf, model, seed, random_seed, steps, guidance, scheduler, size, count
    )  # fmt: skip
    return form, go, stop, bar


def _slider(label: str, low: float, high: float, value: float, step: float) -> gr.Slider:
    name = label.lower().replace(" ", "-")
    return gr.Slider(low, high, value=value, step=step, label=label, min_width=140, buttons=[], elem_id=name)


def _wire(studio: Studio, page: gr.Blocks, form: Form, outcome: Outcome) -> None:
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def run(values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield {outcome.go: gr.Button(visible=False), outcome.stop: gr.Button(visible=True)}
        calm = {outcome.go: gr.Button(visible=True), outcome.stop: gr.Button(visible=False)}
        try:
            with toasted():
                yield from _run(studio, form, outcome, values, str(request.session_hash))
        except Exception:  # whatever it is, the page must be able to go on; gradio shows or logs it
            yield {**calm, outcome.bar: markup.note("Ready.")}
            raise
        yield calm

    def cancel(request: gr.Request) -> None:
        studio.cancel(str(request.session_hash))

    def show(shots: tuple[Shot, ...], chosen: gr.SelectData) -> str:
        shot = shots[chosen.index]
        return markup.settings(shot.job, shot.file)

    results = [*vars(outcome).values(), form.seed]
    gr.on(
        [outcome.go.click, form.prompt.submit],
        run,
        form.inputs | {outcome.shots},
        results,
        concurrency_limit=16,
        trigger_mode="once",
        **hidden,
    )
    outcome.stop.click(cancel, None, None, queue=False, **hidden)
    outcome.gallery.select(show, outcome.shots, outcome.details, **hidden)
    page.unload(cancel)
    rows = form.rack.rows
    page.load(lambda: rack.on_load(form.rack), None, [*(r.lora for r in rows), *(r.words for r in rows)], **hidden)


def _run(
    studio: Studio, form: Form, outcome: Outcome, values: Mapping[Any, Any], session: str
) -> Iterator[dict[Any, Any]]:
    """One job of one page: yields what changes in its widgets."""
    job, shots = form.job(values), values[outcome.shots]
    with studio.job_of(session) as asked:
        yield {outcome.bar: markup.bar(0, f"loading {job.model}"), form.seed: job.seed}
        notes: tuple[str, ...] = ()
        done = 0
        with closing(render(studio.mixer(job.model), job)) as events:
            for event in events:
                if isinstance(event, Picture):
                    done, notes = done + 1, event.notes
                    shots = (_kept(studio, outcome, event), *shots)[:KEPT]
                    yield _gallery(outcome, shots)
                else:
                    yield {outcome.bar: _bar(event, job)}
                if asked.is_set():
                    break
    told = f"Cancelled after {_pictures(done)}." if asked.is_set() and done < job.count else f"{_pictures(done)} done."
    yield {outcome.bar: markup.note(" ".join((told.capitalize(), *notes)))}


def _kept(studio: Studio, outcome: Outcome, picture: Picture) -> Shot:
    """The picture saved in the output folder, with a copy that pages may fetch."""
    path = save(picture, studio.output)
    return Shot(save_file_to_cache(path, outcome.gallery.GRADIO_CACHE), picture.job, str(path))


def _gallery(outcome: Outcome, shots: tuple[Shot, ...]) -> dict[Any, Any]:
    return {
        outcome.gallery: [(shot.shown, markup.caption(shot.job)) for shot in shots],
        outcome.details: markup.settings(shots[0].job, shots[0].file),
        outcome.shots: shots,
    }


def _bar(at: Progress, job: Job) -> str:
    if at.step == 0:
        return markup.bar(0, "waiting for other pictures to be done")
    share = (at.picture + at.step / at.steps) / job.count
    which = f"picture {at.picture + 1} of {job.count}, " if job.count > 1 else ""
    return markup.bar(share, f"{which}step {at.step} of {at.steps}")


def _pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"
