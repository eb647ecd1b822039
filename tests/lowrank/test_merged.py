"""A merged parameter is W0 + sum(weight * delta) as float64 has it, rounded once; what overflows is refused."""

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import IA3, Delta, DoRA, Full, LowRank, Replacement
from sdlora.lowrank.merged import BLOCK, Terms, merge
from tests.mixing.test_parameters import LAWS

SHAPES = [(32, 32), (32, 32, 3, 3), (32, 32, 1, 1)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def pair(shape: tuple[int, ...], rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LowRank:
    """As files have it for a parameter of this shape; alpha != rank."""
    down = numbers(rank, *shape[1:], seed=seed).to(dtype)
    return LowRank(down, numbers(shape[0], rank, *[1] * len(shape[2:]), seed=seed + 100).to(dtype), alpha=3.0)


def merged(untouched: Tensor, terms: Terms, dtype: torch.dtype | None = None) -> Tensor:
    """Into memory that held something else."""
    out = torch.full_like(untouched, float("nan"), dtype=dtype or untouched.dtype)
    merge(untouched, terms, out)
    return out


def product(delta: LowRank) -> Tensor:
    """alpha / rank * up @ down in float64, with a Tucker core between them where there is one."""
    up, down = delta.up.double().flatten(1), delta.down.double().flatten(1)
    if delta.mid is None:
        return delta.alpha / delta.down.shape[0] * up @ down
    core = torch.einsum("om,mnhw,ni->oihw", up, delta.mid.double(), down)
    return delta.alpha / delta.down.shape[0] * core.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_any_number_of_low_rank_pairs_is_their_weighted_sum(count: int, shape: tuple[int, ...], dtype: torch.dtype):
    untouched = numbers(*shape, seed=50)
    terms = tuple((pair(shape, 2 + i, i, dtype), 0.5 - 0.3 * i) for i in range(count))
    expected = untouched.double().flatten(1) + sum(weight * product(delta) for delta, weight in terms)
    assert (merged(untouched, terms).double().flatten(1) - expected).abs().max() < 2e-6
    assert (untouched.double().flatten(1) - expected).abs().max() > 0.1


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("block", [1, 900, 2**30])
def test_blocks_of_rows_make_up_the_whole_with_any_product_of_matrices(monkeypatch, block: int, onednn: bool):
    monkeypatch.setattr("sdlora.lowrank.merged.BLOCK", block)
    if not onednn:
        monkeypatch.setattr("sdlora.lowrank.merged.ONEDNN", None)
    shape = (32, 16, 3, 3)
    untouched, terms = numbers(*shape, seed=50), ((pair(shape, 4, 0), 0.7), (Full(numbers(*shape, seed=3)), 0.2))
    expected = untouched.double() + 0.7 * product(terms[0][0]).view(shape) + 0.2 * numbers(*shape, seed=3).double()
    assert (merged(untouched, terms).double() - expected).abs().max() < 1e-6


def test_a_parameter_of_several_blocks_is_whole():
    untouched, delta = numbers(1030, 700, seed=50), pair((1030, 700), 4, 0)
    assert untouched.numel() > BLOCK and len(untouched) % (BLOCK // 700)
    expected = untouched.double() + 0.7 * product(delta)
    assert (merged(untouched, ((delta, 0.7),)).double() - expected).abs().max() < 1e-6


def test_pointwise_and_flattened_pairs_are_the_same_as_those_in_the_parameters_shape():
    for shape, told in (((32, 16, 1, 1), (32, 16)), ((32, 16), (32, 16, 1, 1)), ((32, 16, 3, 3), (32, 144))):
        untouched, delta = numbers(*shape, seed=50), pair(told, 4, 0)
        expected = untouched.double().flatten(1) + 0.7 * product(delta)
        assert (merged(untouched, ((delta, 0.7),)).double().flatten(1) - expected).abs().max() < 1e-6


def oracle(delta: Delta, base: Tensor) -> Tensor:
    """W' - W in float64 by the papers' formulas; rotations have their oracles elsewhere and are taken at their word."""
    wide, ones = base.double(), [1] * (base.ndim - 1)
    if isinstance(delta, LowRank):
        return product(delta).reshape(base.shape)
    if isinstance(delta, Full):
        return delta.diff.double().reshape(base.shape)
    if isinstance(delta, Replacement):
        return delta.value.double().reshape(base.shape) - wide
    if isinstance(delta, IA3):
        return wide * delta.vector.double().view([1, -1, *ones[1:]] if delta.on_input else [-1, *ones])
    if isinstance(delta, DoRA):
        turned = wide + oracle(delta.inner, base)
        others = tuple(axis for axis in range(base.ndim) if delta.magnitude.shape[axis] == 1)
        return delta.magnitude.double() * turned / turned.square().sum(others, keepdim=True).sqrt() - wide
    return delta.weight(base).double()


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("law", LAWS)
def test_every_law_starts_from_the_untouched_weight_beside_all_others(law: str, shape: tuple[int, ...]):
    untouched, full = numbers(*shape, seed=50), Full(numbers(*shape, seed=5))
    terms = ((pair(shape, 3, 1), 0.5), (LAWS[law](*shape[2:]), -0.7), (full, 0.3), (pair(shape, 4, 2), 2.0))
    expected = untouched.double() + sum(weight * oracle(delta, untouched) for delta, weight in terms)
    assert (merged(untouched, terms).double() - expected).abs().max() < 3e-6
    assert (merged(untouched, (terms[1],)).double() - untouched).abs().max() > 1e-2


def test_a_tucker_core_counts():
    delta = LowRank(numbers(4, 32, 1, 1), numbers(32, 4, 1, 1, seed=1), alpha=2.0, mid=numbers(4, 4, 3, 3, seed=2))
    untouched = numbers(32, 32, 3, 3, seed=50)
    expected = untouched.double() + 1.5 * oracle(delta, untouched) + 0.5 * oracle(pair((32, 32, 3, 3), 4, 3), untouched)
    terms = ((delta, 1.5), (pair((32, 32, 3, 3), 4, 3), 0.5))
    assert (merged(untouched, terms).double() - expected).abs().max() < 2e-6


def test_norms_and_biases_are_summed_too():
    terms = ((Full(numbers(7)), 0.5), (IA3(numbers(7, seed=1), on_input=False), 2.0))
    base = numbers(7, seed=2)
    expected = base.double() + 0.5 * numbers(7).double() + 2.0 * base.double() * numbers(7, seed=1).double()
    assert (merged(base, terms).double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_base_is_rounded_once_however_many_deltas_there_are(dtype: torch.dtype):
    step = torch.finfo(dtype).eps
    ones, small = torch.ones(16, 16, dtype=dtype), torch.zeros(1, 16)
    small[0, 0] = 1.0
    up = torch.full((16, 1), 0.3 * step)
    terms: Terms = tuple((LowRank(small, up, alpha=1.0), 1.0) for _ in range(4))
    terms += tuple((Full(torch.full((16, 16), 0.3 * step)), 1.0) for _ in range(4))
    total = merged(ones, terms)
    assert total.dtype == dtype
    assert torch.equal(total[:, 0], 1 + 2 * step * torch.ones(16, dtype=dtype)), "8 * 0.3 steps are 2.4"
    assert torch.equal(total[:, 1:], 1 + step * torch.ones(16, 15, dtype=dtype)), "4 * 0.3 steps are 1.2"
    base = numbers(32, 32, seed=50).to(dtype)
    mix = ((pair((32, 32), 4, 0), 0.7), (LAWS["dora by output"](), 0.4))
    assert torch.equal(merged(base, mix), merged(base.float(), mix).to(dtype))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def displaced(tensor: Tensor, by: int) -> Tensor:
    """The same in memory that begins `by` bytes behind a multiple of 64, as tensors of a mapped file may."""
    room = torch.empty(tensor.nbytes + 64, dtype=torch.uint8)
    moved = torch.frombuffer(room.numpy()[by:], dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
    return moved.copy_(tensor)


@pytest.mark.parametrize("shape", [(32, 32), (30, 10), (9, 9), (7, 5), (16, 4, 3, 3), (64, 48)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_same_terms_give_the_same_bits_wherever_the_numbers_lie(shape: tuple[int, ...], count: int):
    untouched = numbers(*shape, seed=50)
    pairs = [pair(shape, 16, i) for i in range(count)]
    once = bits(merged(untouched, tuple((delta, 0.7) for delta in pairs)))
    for by in (0, 1, 4, 16, 28, 56):
        moved = [LowRank(displaced(one.down, by), displaced(one.up, by), one.alpha) for one in pairs]
        out = displaced(torch.full(shape, float("nan")), by)
        merge(displaced(untouched, 60 - by), tuple((delta, 0.7) for delta in moved), out)
        assert bits(out) == once


def test_memory_of_any_layout_is_read_and_written():
    shape = (32, 16, 3, 3)
    terms = ((pair(shape, 4, 0), 0.7), (Full(numbers(*shape, seed=3)), 0.2))
    untouched = numbers(*shape, seed=50)
    pixels = untouched.contiguous(memory_format=torch.channels_last)
    out = torch.zeros_like(pixels)
    assert not out.is_contiguous()
    merge(pixels, terms, out)
    assert torch.equal(out, merged(untouched, terms))
    across = torch.zeros(16, 32).T
    merge(numbers(16, 32, seed=50).T, ((pair((32, 16), 4, 0), 0.7),), across)
    assert torch.equal(across, merged(numbers(16, 32, seed=50).T.contiguous(), ((pair((32, 16), 4, 0), 0.7),)))


def test_a_parameter_that_is_trained_is_written_without_a_trace():
    parameter = torch.nn.Parameter(torch.zeros(32, 32))
    merge(numbers(32, 32), ((pair((32, 32), 4, 0), 1.0),), parameter)
    assert parameter.grad_fn is None and torch.equal(parameter, merged(numbers(32, 32), ((pair((32, 32), 4, 0), 1.0),)))


INFINITE, NOT_A_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("dtype", "terms"),
    [
        (torch.float16, lambda: [(7e4, 1.0)]),
        (torch.float16, lambda: [(-6e4, 1.0), (-6e3, 1.0)]),
        (torch.bfloat16, lambda: [(3.4e38, 1.0)]),
        (torch.float32, lambda: [(3e38, 1.0), (3e38, 1.0)]),
        (torch.float32, lambda: [(1.0, 1e300)]),
        (torch.float32, lambda: [(INFINITE, 1.0)]),
        (torch.float32, lambda: [(INFINITE, 1.0), (INFINITE, -1.0)]),
        (torch.float32, lambda: [(NOT_A_NUMBER, 1.0)]),
    ],
)
@pytest.mark.parametrize("law", ["low rank", "full"])
def test_one_value_that_overflows_is_refused(dtype, terms, law):
    def delta(value: float) -> Delta:
        place = torch.zeros(1, 300)
        place[0, 77] = 1.0
        up = torch.zeros(40, 1)
        up[33, 0] = value
        return LowRank(place, up, alpha=1.0) if law == "low rank" else Full(torch.where(place * up == 0, 0.0, value))

    untouched = numbers(40, 300).to(dtype)
    with pytest.raises(SdloraError, match=f"^the mix overflows {str(dtype)[6:]}; use smaller weights$"):
        merged(untouched, tuple((delta(value), weight) for value, weight in terms()))


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 3e38), (torch.float32, 3e38)])
def test_large_values_whose_sum_alone_overflows_are_fine(dtype, value):
    total = merged(torch.zeros(40, 32, dtype=dtype), ((Full(torch.full((40, 32), value)), 1.0),))
    assert torch.equal(total, torch.full((40, 32), value).to(dtype))


def test_a_delta_that_does_not_fit_is_refused():
    for delta in (pair((32, 16), 4, 0), pair((32, 32, 3, 3), 4, 0), Full(numbers(32))):
        with pytest.raises(SdloraError, match="does not fit a weight of shape 32x32"):
            merged(numbers(32, 32), ((delta, 1.0),))
