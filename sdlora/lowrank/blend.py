"""Several adapters in one: their deltas added, voted on or kept apart, one parameter at a time.

Everything is computed in float64 or float32 and rounded once; no more than one parameter's products are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import isfinite, prod

import torch
from torch import Tensor

from sdlora.errors import SdloraError, nearest
from sdlora.lowrank.adapter import Adapter, Embeddings, same_vectors
from sdlora.lowrank.effect import balanced, factor_pair, linear_change
from sdlora.lowrank.laws import Delta, Full, LowRank, Replacement
from sdlora.lowrank.laws.delta import Shape, times
from sdlora.lowrank.targets import matching
from sdlora.lowrank.truncation import NOISE, Keep, Kept, Outcome, as_low_rank, decompose, shaped, singular, truncate

Pair = tuple[Tensor, Tensor]  # up (out, rank) and down (rank, in * kh * kw) in float64


@dataclass(frozen=True)
class Weights:
    """The weights of one adapter.

    everywhere: for all components that are not in `components`. blocks: patterns over module paths, as targets are
    written ("unet.down_blocks.1.*", "attn2.to_k"), and factors; of the patterns that match a module the last one
    counts, and multiplies its component's weight. A module's bias follows it. 0 leaves out; negative weights are fine.
    """

    everywhere: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for weight in (self.everywhere, *self.components.values(), *self.blocks.values()):
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
                raise SdloraError(f"the weight {weight!r} is no finite number")

    def of(self, paths: Sequence[str]) -> dict[str, float]:
        """The weight of each path; SdloraError for components and patterns that none of them has."""
        components = dict.fromkeys(path.partition(".")[0] for path in paths)
        for name in self.components:
            if name not in components:
                raise SdloraError(
                    f"it has no component {name!r}{nearest(name, components)}; it has {_list(components)}"
                )
        factors = dict.fromkeys(paths, 1.0)
        for pattern, factor in self.blocks.items():
            factors.update(dict.fromkeys(_matching(pattern, paths), factor))
        return {path: self.components.get(path.partition(".")[0], self.everywhere) * factors[path] for path in paths}


@dataclass(frozen=True, eq=False)
class Blend:
    """The blended adapter, and what the parameters that have ranks kept; whole deltas, which add exactly, are left out.

    The adapter's metadata is empty: what its parents were is for the caller to say.
    """

    adapter: Adapter
    kept: Mapping[str, Kept]


@dataclass(frozen=True, eq=False)
class _Parent:
    index: int  # its place among the adapters, from 1
    adapter: Adapter
    weights: Mapping[str, float]  # by path


@dataclass(frozen=True, eq=False)
class _Term:
    index: int  # of the parent
    delta: Delta
    weight: float


@dataclass(frozen=True, eq=False)
class _Place:
    """One parameter, and all that is to be blended there."""

    path: str
    terms: tuple[_Term, ...]
    shape: Shape
    base: Tensor | None

    @property
    def whole(self) -> bool:
        """Whether the result has no low-rank form: a bias, a norm, or an addend that is written out whole."""
        return len(self.shape) < 2 or any(isinstance(term.delta, Full | Replacement) for term in self.terms)

    @property
    def ranks(self) -> int:
        """The sum of the ranks; what is not LoRA counts as the rank that the matrix can have."""
        full = min(self.shape[0], prod(self.shape[1:]))
        return sum(term.delta.rank if isinstance(term.delta, LowRank) else full for term in self.terms)


Method = Callable[[_Place, Keep | None, float, int], Outcome]  # of a place, keep, density and seed


def blend(
    adapters: Sequence[tuple[Adapter, Weights]],
    method: str = "sum",
    keep: Keep | None = None,
    density: float = 0.5,
    seed: int = 0,
    bases: Callable[[str], Tensor] | None = None,
) -> Blend:
    """One adapter of several. See `blended` for the methods and arguments, and for what raises SdloraError."""
    outcomes = list(blended(adapters, method, keep, density, seed, bases))
    deltas = {outcome.path: outcome.delta for outcome in outcomes}
    kept = {outcome.path: outcome.kept for outcome in outcomes if outcome.kept is not None}
    return Blend(Adapter(deltas, embeddings=shared_embeddings(adapters)), kept)


def blended(
    adapters: Sequence[tuple[Adapter, Weights]],
    method: str = "sum",
    keep: Keep | None = None,
    density: float = 0.5,
    seed: int = 0,
    bases: Callable[[str], Tensor] | None = None,
) -> Iterator[Outcome]:
    """Blend parameter by parameter, in the order in which the adapters first name them.

    Methods, for deltas d and weights w:
    sum: sum of w * d. LoRA factors are put side by side, so that ranks add; other laws become LoRA that loses nothing.
    orthogonal: as sum, after each adapter is projected off the row and column spaces of those before it, on factors:
        up - Q Q^T up for the basis Q of their columns, down likewise. Where those span the space nothing is left of it.
    ties: of each d the `density` largest values stay; the sign of sum of w * d is elected for each element; the result
        is the mean of those w * d that have it (arXiv:2306.01708; here the trimming is per parameter).
    dare: each value of d stays with probability `density` and is divided by it, else it is 0 (arXiv:2311.03099). The
        draw depends on seed, path and the adapter's place in the list, not on the order of paths.
    dare_ties: as ties, with the draw of dare in place of the trimming.
    The last three work on elements, so that the products are formed, and decomposed to `keep` or else to the sum of the
    ranks; what such a blend loses is in Kept. Whole deltas (weights written out, norms, biases) stay whole: all methods
    but orthogonal treat them as any other, and that adds vectors and refuses matrices.
    keep: truncates sum and orthogonal too, from their factors; without it they are exact.
    bases: the untouched parameter of a path, needed where a law depends on it (DoRA, (IA)^3, OFT ...).
    SdloraError: an unknown method, a density out of (0, 1], a pattern or component that fits nothing, shapes that
    differ, a law that needs a base that is not given, a token with two meanings.
    """
    if method not in METHODS:
        raise SdloraError(
            f"blend method {method!r} is unknown{nearest(method, METHODS)}; choose one of {_list(METHODS)}"
        )
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise SdloraError(f"density {density!r} is out of range; give a share above 0, at most 1, such as 0.5")
    if not adapters:
        raise SdloraError("no adapters to blend are given; give at least one")
    parents = _taken(adapters)
    shared_embeddings(adapters)  # refuses before the work, not after it
    terms = _terms(parents)
    if bases is None:
        _refuse_what_needs_a_base(terms)
    for path, there in terms.items():
        try:
            yield METHODS[method](_place(path, there, bases), keep, density, seed)
        except SdloraError as error:
            raise SdloraError(f"{path}: {error}") from error


def _sum(place: _Place, keep: Keep | None, density: float, seed: int) -> Outcome:
    if place.whole:
        return Outcome(place.path, Full(torch.stack(_changes(place)).sum(0)), None)
    delta, weight = place.terms[0].delta, place.terms[0].weight
    if len(place.terms) > 1 or not isinstance(delta, LowRank):
        return _joined(place, _pairs(place), keep)
    weighted = replace(delta, alpha=delta.alpha * weight)  # to the bit
    if keep is None:
        return Outcome(place.path, weighted, Kept(delta.rank, delta.rank, 1.0, 0.0))
    return Outcome(place.path, *as_low_rank(weighted, place.shape, keep))


def _orthogonal(place: _Place, keep: Keep | None, density: float, seed: int) -> Outcome:
    if place.whole and len(place.shape) > 1:
        raise SdloraError("orthogonal works on factors and this delta is written out whole; convert it to LoRA first")
    if place.whole or len(place.terms) == 1:
        return _sum(place, keep, density, seed)
    first, *others = _pairs(place)
    left, _, right = _singular(first, place.shape)
    apart = [first]
    for up, down in others:
        noise = NOISE * float(up.norm() * down.norm())
        outside = up - left @ (left.T @ up), down - (down @ right.T) @ right
        columns, values, rows = _singular(outside, place.shape, noise)
        apart.append((columns * values, rows))
        left, right = torch.cat([left, columns], 1), torch.cat([right, rows])
    return _joined(place, apart, keep)


def _singular(pair: Pair, shape: Shape, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """The singular vectors and values of the product, (out, n), (n,) and (n, in * kh * kw), without those of noise."""
    left, values, right = singular(shaped(*pair, shape))
    real = int((values > max(noise, NOISE * float(values[0]))).sum())
    return left[:, :real], values[:real], right[:real]


def _pairs(place: _Place) -> list[Pair]:
    """The factors of each term, its weight in up."""
    pairs = []
    for term in place.terms:
        up, down = factor_pair(as_low_rank(term.delta, place.shape, Keep(), place.base)[0])
        pairs.append((up * term.weight, down))
    return pairs


def _joined(place: _Place, pairs: Sequence[Pair], keep: Keep | None) -> Outcome:
    """The sum of the products: the factors side by side, and truncated where `keep` or the size of the matrix asks."""
    pairs = [balanced(*pair) for pair in pairs]
    whole = shaped(torch.cat([up for up, _ in pairs], 1), torch.cat([down for _, down in pairs]), place.shape)
    keep = keep or Keep()
    if keep.keeps_all(whole.rank) and whole.rank <= min(place.shape[0], prod(place.shape[1:])):
        narrow = replace(whole, up=whole.up.float(), down=whole.down.float())
        return Outcome(place.path, narrow, Kept(whole.rank, whole.rank, 1.0, 0.0))
    return Outcome(place.path, *truncate(whole, keep))


def _changes(place: _Place) -> list[Tensor]:
    """weight * delta of each term, multiplied out in float32."""
    return [
        term.weight
        * (linear_change(term.delta).reshape(place.shape) if place.base is None else term.delta.weight(place.base))
        for term in place.terms
    ]


def _by_element(combine: Callable[[_Place, Tensor, float, int], Tensor]) -> Method:
    """The method that combines the products (terms, out, in[, kh, kw]) element by element."""

    def method(place: _Place, keep: Keep | None, density: float, seed: int) -> Outcome:
        combined = combine(place, torch.stack(_changes(place)), density, seed)
        if place.whole:
            return Outcome(place.path, Full(combined), None)
        delta, kept = decompose(combined, keep or Keep(rank=place.ranks))
        return Outcome(place.path, delta, replace(kept, rank_before=place.ranks))

    return method


def _ties(place: _Place, changes: Tensor, density: float, seed: int) -> Tensor:
    return _elected(torch.stack([_trimmed(change, density) for change in changes]))


def _dare(place: _Place, changes: Tensor, density: float, seed: int) -> Tensor:
    return _drawn(place, changes, density, seed).sum(0)


def _dare_ties(place: _Place, changes: Tensor, density: float, seed: int) -> Tensor:
    return _elected(_drawn(place, changes, density, seed))


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The largest values, a share of `density`, at least one and those as large as the least of them; the others 0."""
    sizes = change.abs()
    dropped = sizes.numel() - max(round(density * sizes.numel()), 1)
    return torch.where(sizes >= sizes.flatten().kthvalue(dropped + 1).values, change, 0)


def _elected(changes: Tensor) -> Tensor:
    """The mean, for each element, of those values that have the sign of the sum."""
    agree = changes.sign() == changes.sum(0).sign()
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


def _drawn(place: _Place, changes: Tensor, density: float, seed: int) -> Tensor:
    """Each value divided by `density` with that probability, else 0."""
    draws = []
    for term, change in zip(place.terms, changes, strict=True):
        digest = sha256(f"{seed} {term.index} {place.path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        stays = torch.rand(change.shape, generator=generator).to(change.device) < density
        draws.append(change / density * stays)
    return torch.stack(draws)


METHODS: Mapping[str, Method] = {
    "sum": _sum,
    "orthogonal": _orthogonal,
    "ties": _by_element(_ties),
    "dare": _by_element(_dare),
    "dare_ties": _by_element(_dare_ties),
}


def _taken(adapters: Sequence[tuple[Adapter, Weights]]) -> list[_Parent]:
    """The adapters with a weight for each path; those whose deltas all have weight 0 are left out."""
    taken = []
    for index, (adapter, weights) in enumerate(adapters, 1):
        try:
            by_path = weights.of(list(adapter.deltas))
        except SdloraError as error:
            raise SdloraError(f"the weights of adapter {index} do not fit it: {error}") from error
        if any(by_path.values()) or not by_path:
            taken.append(_Parent(index, adapter, by_path))
    return taken


def _terms(parents: Sequence[_Parent]) -> dict[str, tuple[_Term, ...]]:
    """What is blended at each path, weights of 0 left out."""
    terms: dict[str, tuple[_Term, ...]] = {}
    for parent in parents:
        for path, delta in parent.adapter.deltas.items():
            if parent.weights[path]:
                terms[path] = (*terms.get(path, ()), _Term(parent.index, delta, parent.weights[path]))
    return terms


def _place(path: str, terms: tuple[_Term, ...], bases: Callable[[str], Tensor] | None) -> _Place:
    base = bases(path) if bases and not all(term.delta.linear for term in terms) else None
    # The factors of a convolution may be flat; whoever has the most dimensions knows the shape best.
    best = max(terms, key=lambda term: len(term.delta.shape))
    shape = best.delta.shape if base is None else tuple(base.shape)
    for term in terms:
        if not term.delta.fits(shape):
            found = f"the delta of adapter {term.index} has shape {times(term.delta.shape)}"
            raise SdloraError(f"{found} where {times(shape)} is wanted; blend adapters of one base model")
    return _Place(path, terms, shape, base)


def _refuse_what_needs_a_base(terms: Mapping[str, tuple[_Term, ...]]) -> None:
    for path, there in terms.items():
        for term in there:
            if not term.delta.linear:
                raise SdloraError(
                    f"{path}: {term.delta.name} in adapter {term.index} depends on the base model's weights;"
                    " give that model to blend it"
                )


def shared_embeddings(adapters: Sequence[tuple[Adapter, Weights]]) -> Embeddings:
    """The learned tokens of all adapters that have a weight. SdloraError: two mean different things by one."""
    found: dict[str, tuple[int, Mapping[str, Tensor]]] = {}
    for parent in _taken(adapters):
        for token, vectors in parent.adapter.embeddings.items():
            first, known = found.setdefault(token, (parent.index, vectors))
            if not same_vectors(known, vectors):
                raise SdloraError(
                    f"the token {token!r} has one meaning in adapter {first} and another in adapter {parent.index};"
                    " rename it in one of them, or leave one out"
                )
    return {token: vectors for token, (_, vectors) in found.items()}


def _matching(pattern: str, paths: Sequence[str]) -> list[str]:
    """The paths whose module, or which themselves, match; a bias follows its module."""
    module_of = {path: path.removesuffix(".bias") for path in paths}
    names = dict.fromkeys([*paths, *module_of.values()])
    try:
        hits = set(matching(pattern, names))
    except SdloraError:
        blocks = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
        hint = nearest(pattern.strip(".*"), sorted(blocks))
        raise SdloraError(f"no module of it matches the block pattern {pattern!r}{hint}") from None
    return [path for path, module in module_of.items() if path in hits or module in hits]


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(names)
