"""The mixer: any number of adapters over one pipeline, applied as a plan says, off to the bit.

A touched weight is always computed anew, W = W0 + sum(weight_i * delta_i), from the untouched one, in float32, and
rounded once; generation then costs what it costs without LoRA. What changes from step to step or from picture to
picture, and what lies on a base that cannot be written to, is computed beside the layers instead (`live`). The same
plan gives the same bits, whatever was applied before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

from sdlora.errors import SdloraError, nearest
from sdlora.formats.architectures import architecture_of
from sdlora.formats.receipt import Receipt
from sdlora.formats.sources import name_of
from sdlora.lowrank.adapter import Adapter, same_vectors
from sdlora.mixing.base import Base
from sdlora.mixing.following import Follower
from sdlora.mixing.live import Live
from sdlora.mixing.plan import LoraWeight, Plan, Weights, lora_weight
from sdlora.mixing.shelf import Book, Shelf, content_of
from sdlora.mixing.succession import Word, refuse_foreign, take_over
from sdlora.mixing.tokens import Vocabulary, check_tokens, grown, learned, own_vocabulary, put, refuse_taught
from sdlora.mixing.ways import Ways, ways
from sdlora.models.families import components_of, family_of
from sdlora.models.load import source_of

CACHE = 2**30  # bytes of adapters that are kept although nothing uses them now


class Mixer:
    """Adds, weighs and removes adapters over a pipeline's UNet and text encoders.

    Weights, biases and norms follow the weights that are set. Learned tokens are known from when an adapter is added
    until it is unloaded, whatever its weight. If a change fails midway, nothing is applied any more: the state is
    "base", and the adapters stay at hand.
    model: the name of the base in plans; cache: bytes of adapters to keep in memory for when they are asked for again.
    One job at a time: `render` and `using` hold `lock`; whoever else would change the mix meanwhile gets SdloraError.
    So does a second mixer over the model, or over another that shares a part of it, while the first has LoRAs.
    """

    def __init__(self, pipeline: Any, model: str = "", cache: int = CACHE) -> None:
        self.pipeline = pipeline
        self.model = model
        self.lock = threading.Lock()
        self._worker: threading.Thread | None = None  # whose changes belong to the job that holds the lock
        self._parts = components_of(pipeline)
        refuse_foreign(self._parts)
        self.architecture = architecture_of(self._parts)
        self._base = Base(self._parts, source_of(pipeline, model))
        self._live = Live(self._base.modules, self._base.original)
        self._shelf = Shelf(self.architecture, cache)
        self._books: dict[str, Book] = {}
        self._plans: tuple[Plan, ...] = (Plan(model),)
        self._ways: Ways | None = None
        self._asked_live = False
        self._own: dict[str, Vocabulary] = {}
        self._vocabularies: dict[str, Vocabulary] = {}  # what the text encoders read now
        self._word = Word(ref(self), ref(pipeline), self._live, self._base, self._own, self._vocabularies)
        with self.lock:  # or another mixer's tokens could be taken for the base's
            take_over(self._word, self._parts)
            self._own.update({name: own_vocabulary(pipeline, name) for name in family_of(pipeline).text_encoders})
            self._vocabularies.update(self._own)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters at hand, in the order they were added."""
        return tuple(self._books)

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What is in force: one plan, or one for each picture of a batch."""
        return self._plans

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The weights in force in the first picture, by adapter and component; adapters that are off are left out."""
        loras = {lora.path: lora for lora in self._plans[0].loras}
        found = {name: {one: lora.of(one) for one in self._parts} for name, lora in loras.items()}
        return {name: by for name, by in found.items() if any(by.values())}

    @property
    def state(self) -> str:
        """ "base", "merged", "live", or "merged and live": how what is in force is applied."""
        told = (("merged", self._base.changed), ("live", self._live.paths))
        return " and ".join(name for name, paths in told if paths) or "base"

    @property
    def reading(self) -> Hashable:
        """What the text encoders hold now, as a value: where it is the same, a prompt means the same."""
        brought = sorted(book.content for book in self._books.values() if book.adapter.embeddings)
        told = sorted((lora.sha256, *_heard(lora)) for lora in self._plans[0].loras)
        return tuple(brought), tuple(told)

    def load(self, path: Path | str, name: str | None = None, partial: bool = False) -> Receipt:
        """Add the adapter of a LoRA file or PEFT folder, at weight 0, and return the receipt of reading it.

        What was loaded before is read again only if it has changed; a name that is taken is replaced and keeps its
        weights. Files that do not fit raise SdloraError and change nothing. partial: as for `read`.
        """
        path = Path(path)
        with self._claimed():
            book = self._shelf.read(path, partial)
            self._put(name_of(path) if name is None else name, book)
        assert book.receipt is not None
        return book.receipt

    def add(self, adapter: Adapter, name: str) -> None:
        """Add an adapter at weight 0. A name that is taken is replaced and keeps its weights.

        SdloraError: it does not fit the model, or one of its tokens is taken; nothing has changed then. If its weights
        make the mix overflow, the adapter is not added and the state is "base".
        """
        with self._claimed():
            self._put(name, Book(adapter, content_of(adapter)))

    def unload(self, name: str) -> None:
        """Take an adapter, its effect and its tokens away."""
        with self._claimed():
            self._known(name)
            books = {other: book for other, book in self._books.items() if other != name}
            self._become(books, tuple(_following(plan, books) for plan in self._plans), self._asked_live)

    def receipt(self, name: str) -> Receipt | None:
        """What reading an adapter told; None for one that was not read from files."""
        self._known(name)
        return self._books[name].receipt

    def plan(self, weights: Mapping[str, Weights]) -> Plan:
        """The plan in which the adapters named have these weights and all others are off."""
        if not isinstance(weights, Mapping):
            raise SdloraError(f'{weights!r} are no weights by name; write them as in {{"style": 0.8, "zib": 1.0}}')
        for name in weights:
            self._known(name)
        loras = (lora_weight(name, told, tuple(self._parts)) for name, told in weights.items())
        return Plan(self.model, tuple(replace(lora, sha256=self._books[lora.path].content) for lora in loras))

    def set(self, weights: Mapping[str, Weights]) -> None:
        """Make the mix exactly this: the adapters named get these weights, all others are off.

        Unknown names and components and weights that are no finite numbers raise SdloraError and change nothing.
        """
        with self._claimed():
            self.apply(self.plan(weights))

    def apply(self, *plans: Plan, live: bool = False) -> None:
        """Bring the model to this plan; or to several, one for each picture of a batch.

        The rows of a batch then belong to the plans in turn, and again from the first. live: merge nothing, which is
        the quicker way to a few steps. Schedules follow the timesteps that the UNet is given, among those of the
        pipeline's scheduler. SdloraError: a plan for another base, or for an adapter that is not at hand.
        """
        with self._claimed():
            self._become(self._books, plans or (Plan(self.model),), live)

    def hold(self, *plans: Plan, partial: bool = False, live: bool = False) -> tuple[Plan, ...]:
        """Apply plans whose adapters are files, and keep no others; returns them with the hashes of the content.

        What is at hand under a name that is no file stays. One step: what leaves makes room for what comes, as for
        another LoRA's token of the same name. Where one cannot be had, or holds something else than the plan was made
        with, SdloraError, and nothing has changed. partial: as for `read`.
        """
        files = dict.fromkeys(lora.path for plan in plans for lora in plan.loras)
        _refuse_twice(files)
        with self._claimed():
            books = {path: self._book(path, partial) for path in files}
            for lora in (lora for plan in plans for lora in plan.loras):
                _refuse_other(lora, books[lora.path])
            plans = tuple(_following(plan, books) for plan in plans)
            self._become(books, plans or (Plan(self.model),), live)
        return plans

    def at(self, progress: float | None) -> None:
        """Tell schedules how far the denoising is, from 0 (noise) to 1 (the picture). Costs next to nothing.

        For loops of one's own, and for a UNet that is compiled as one graph: schedules then follow what is told and no
        timesteps, until another plan is applied or None is told.
        """
        if not self._ways or not self._ways.moves:
            return
        if progress is None:
            self._follow(self._ways)
        else:
            self._live.weigh(self._ways.weights(progress))

    @contextmanager
    def using(self, *plans: Plan) -> Iterator[Mixer]:
        """With the plan applied, and nobody else's job between; afterwards what was in force before is again.

        That follows what adapters of the same names hold then, without those that are gone.
        It waits for others' jobs, and for ever between two events of a `render` that nobody else goes on reading.
        SdloraError: within another `using` of the same thread.
        """
        self.refuse_within()
        with self.lock:
            before, live = self._plans, self._asked_live
            try:
                with self.at_work():
                    self.apply(*plans)
                    yield self
            finally:
                with self.at_work():
                    self.apply(*(_following(plan, self._books) for plan in before), live=live)

    def refuse_within(self) -> None:
        """SdloraError within `using` of the same thread, which would wait for itself for ever."""
        if self._worker is threading.current_thread():
            raise SdloraError("this thread is using a plan of the mixer already; leave `with mixer.using` first")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """For a job that holds `lock`: what this thread does to the mix within this belongs to it."""
        self._worker = threading.current_thread()
        try:
            yield
        finally:
            self._worker = None

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """A change that belongs to a job, or is one by itself. SdloraError where another's job counts on the mix."""
        if self._worker is threading.current_thread():
            yield
        elif not self.lock.acquire(blocking=False):
            raise SdloraError("the mixer is in use by a job that is not done; wait for it, or change the next job")
        else:
            try:
                with self.at_work():
                    yield
            finally:
                self.lock.release()

    def _known(self, name: str) -> None:
        if name not in self._books:
            raise SdloraError(f"no LoRA named {name!r} is loaded{nearest(name, self._books)}; load it first")

    def _book(self, path: str, partial: bool) -> Book:
        """What is at hand under a name that is no file, else the file's: one that is gone is missed."""
        known = self._books.get(path)
        at_hand = known and not os.path.exists(path) and not (known.receipt and known.receipt.path == Path(path))
        return known if known and at_hand else self._shelf.read(Path(path), partial)

    def _put(self, name: str, book: Book) -> None:
        """At hand under this name from now on; plans in force follow it."""
        held = self._books.get(name)
        if held and held.content == book.content:
            self._books[name] = replace(book, adapter=held.adapter)  # its receipt may speak of another file
        else:
            books = {**self._books, name: book}
            self._become(books, tuple(_following(plan, books) for plan in self._plans), self._asked_live)

    def _become(self, books: dict[str, Book], plans: tuple[Plan, ...], live: bool = False) -> None:
        """Bring the model to these adapters and plans. What cannot be is refused before anything changes.

        If it fails later, the base is what is left, with the adapters that were at hand before.
        """
        take_over(self._word, self._parts)
        self._check(books)
        plans = tuple(self._resolved(plan, books) for plan in plans)
        found = self._ways_of(books, plans, live)
        vocabularies = self._vocabularies if books is self._books else self._vocabularies_for(books)
        heard = [one for one, vocabulary in vocabularies.items() if vocabulary is not self._vocabularies[one]]
        try:
            self._base.refuse_replaced(found.merged.keys() | found.live.keys())
            self._live.install(found.live)
            self._live.weigh(found.weights(0.0))
            self._follow(found)
            self._base.become(found.merged)
            for component in heard:
                put(self.pipeline, component, vocabularies[component])
        except BaseException:
            self._plans, self._ways = (Plan(self.model),), None
            self._live.clear()
            try:
                for component in heard:
                    put(self.pipeline, component, self._vocabularies[component])
            finally:
                self._base.restore()
            raise
        self._books, self._plans, self._ways, self._asked_live = books, plans, found, live
        self._vocabularies.update(vocabularies)

    def _follow(self, found: Ways) -> None:
        if found.moves:
            self._live.follow(self._parts["unet"], Follower(ref(self.pipeline), found.weights))

    def _check(self, books: Mapping[str, Book]) -> None:
        """SdloraError where an adapter that comes does not fit the model."""
        for name, book in books.items():
            held = self._books.get(name)
            if not held or held.content != book.content:
                self._base.check(name, book.adapter)
                check_tokens(name, book.adapter, self._own)

    def _ways_of(self, books: Mapping[str, Book], plans: Sequence[Plan], live: bool) -> Ways:
        rows = [{lora.path: lora for lora in plan.loras} for plan in plans]
        names = {name for row in rows for name in row}
        order = sorted(names, key=lambda name: (books[name].content, name))
        adapters = {name: books[name].adapter for name in order}
        return ways(rows, adapters, {"unet"} | self._base.unmergeable() if live else self._base.unmergeable())

    def _resolved(self, plan: Plan, books: Mapping[str, Book]) -> Plan:
        """The plan with the names that its adapters go by now. SdloraError where it cannot be applied here."""
        if not isinstance(plan, Plan):
            raise SdloraError(f"{plan!r} is no plan; make one with mixer.plan({{name: weight}})")
        if plan.base and self.model and plan.base != self.model:
            raise SdloraError(f"the plan is for the model {plan.base}, this one is {self.model}; open that one")
        return replace(plan, loras=tuple(replace(lora, path=_found(lora, books)) for lora in plan.loras))

    def _vocabularies_for(self, books: Mapping[str, Book]) -> dict[str, Vocabulary]:
        """What the text encoders read with these adapters: as little anew as can be."""
        tokens = learned({name: book.adapter for name, book in books.items()})
        found = {}
        for component, own in self._own.items():
            vectors, held = tokens.get(component, {}), self._vocabularies[component]
            if not same_vectors(vectors, held.learned):
                refuse_taught(self.pipeline, component, held)
                held = grown(own, vectors)
            found[component] = held
        return found


def _following(plan: Plan, books: Mapping[str, Book]) -> Plan:
    """The plan with what its names stand for now, without those that stand for nothing."""
    there = (lora for lora in plan.loras if lora.path in books)
    return replace(plan, loras=tuple(replace(lora, sha256=books[lora.path].content) for lora in there))


def _refuse_other(lora: LoraWeight, book: Book) -> None:
    if lora.sha256 not in ("", book.content):
        now, then = book.content[:12], lora.sha256[:12]
        raise SdloraError(f"{lora.path} has changed (sha256 {now}, it was {then}); restore it, or leave the hash out")


def _found(lora: LoraWeight, books: Mapping[str, Book]) -> str:
    """The name of the adapter that a plan means: the one of this content, whatever it is called now."""
    named = books.get(lora.path)
    if named and lora.sha256 in ("", named.content):
        return lora.path
    same = next((name for name, book in books.items() if lora.sha256 and book.content == lora.sha256), None)
    if same is None and named:
        raise SdloraError(f"{lora.path} has another content than the plan was made with; make the plan anew")
    if same is None:
        raise SdloraError(f"no LoRA named {lora.path!r} is loaded{nearest(lora.path, books)}; load it first")
    return same


def _heard(lora: LoraWeight) -> tuple[float, float]:
    """What of a plan counts for text encoders."""
    return lora.at(("text_encoder", "BASE")), lora.at(("text_encoder_2", "BASE"))


def _refuse_twice(files: Iterable[str]) -> None:
    """One file under two spellings would be applied twice."""
    seen: dict[str, str] = {}
    for file in files:
        other = seen.setdefault(os.path.realpath(file), file)
        if other != file:
            raise SdloraError(
                f"{file} is given twice, as {other} too; give each LoRA once, with the sum of its weights"
            )
