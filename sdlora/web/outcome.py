"""What came of jobs: the gallery, the settings of the picture that is looked at, and the bar above them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache

from sdlora.generation.job import Job
from sdlora.generation.notes import left_out
from sdlora.generation.png import save, save_sheet
from sdlora.generation.render import Picture, Progress
from sdlora.mixing.mixer import Mixer
from sdlora.web import markup
from sdlora.web.compare import Comparison
from sdlora.web.events import QUIET
from sdlora.web.studio import Studio

KEPT = 64  # pictures in a page's gallery; all stay in the output folder


@dataclass(frozen=True)
class Shot:
    """A picture in the gallery: a copy that pages may fetch, its job, and its name in the output folder.

    compared: of a sheet, the LoRAs whose weights differ on it; job then has the others only.
    """

    shown: str
    job: Job
    file: str
    compared: str = ""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The widgets that show a job running and what it made."""

    bar: gr.HTML
    gallery: gr.Gallery
    details: gr.HTML
    shots: gr.State

    def added(
        self, studio: Studio, shots: tuple[Shot, ...], done: Sequence[Picture], comparison: Comparison | None
    ) -> tuple[Shot, ...]:
        """The shots with the last of the pictures that are done, behind those of its sheet, and that when it is whole.

        All are saved in the output folder.
        """
        together = comparison.cells if comparison else 1
        place = (len(done) - 1) % together
        shots = (*shots[:place], self._kept(studio, done[-1]), *shots[place:])
        if comparison and place + 1 == together:
            return (self._kept_sheet(studio, comparison, done[-together:]), *shots)
        return shots

    def _kept(self, studio: Studio, picture: Picture) -> Shot:
        path = str(save(picture, studio.output))
        return Shot(save_file_to_cache(path, self.gallery.GRADIO_CACHE), picture.job, path)

    def _kept_sheet(self, studio: Studio, comparison: Comparison, pictures: Sequence[Picture]) -> Shot:
        job = pictures[-1].job
        path = str(save_sheet(comparison.sheet(pictures), studio.output, job))
        others = tuple(lora for i, lora in enumerate(job.loras) if i not in (comparison.first, comparison.second))
        shown = save_file_to_cache(path, self.gallery.GRADIO_CACHE)
        return Shot(shown, replace(job, loras=others), path, comparison.told)

    def filled(self, shots: Sequence[Shot]) -> dict[Any, Any]:
        """The widgets with these pictures, the first of them looked at."""
        first = shots[0]
        return {
            self.gallery: [(shot.shown, markup.caption(shot.job, shot.compared)) for shot in shots],
            self.details: markup.settings(first.job, first.file, first.compared),
            self.shots: tuple(shots),
        }


def build(bar: gr.HTML) -> Outcome:
    """Lay the widgets out and wire them up; the bar stands elsewhere."""
    gallery = gr.Gallery(
        label="Pictures", show_label=False, columns=2, object_fit="contain", height="auto", format="png",
        interactive=False, elem_id="gallery",
    )  # fmt: skip
    details = gr.HTML("", elem_id="details")
    shots = gr.State(())

    def show(shots: tuple[Shot, ...], chosen: gr.SelectData) -> str:
        shot = shots[chosen.index]
        return markup.settings(shot.job, shot.file, shot.compared)

    gallery.select(show, shots, details, **QUIET)
    return Outcome(bar, gallery, details, shots)


def notes(mixer: Mixer, job: Job) -> str:
    """Sentences on what of the job's LoRAs, which the mixer holds, does nothing; "" if all does something."""
    receipts = filter(None, (mixer.receipt(lora.path) for lora in job.loras))
    partly = [receipt.summary() for receipt in receipts if not receipt.complete]
    return " ".join(f"{note}." for note in [*partly, *left_out(mixer, job)])


def bar(at: Progress, total: int) -> str:
    """How far a run of `total` pictures is."""
    if at.step == 0:
        return markup.bar(0, "waiting for other pictures to be done")
    first, last = at.picture + 1, at.picture + at.together
    which = f"picture {first} of {total}, " if at.together == 1 else f"pictures {first} to {last} of {total}, "
    share = (at.picture + at.together * at.step / at.steps) / total
    return markup.bar(share, f"{which if total > 1 else ''}step {at.step} of {at.steps}")
