"""What all laws promise: float32 from any dtype, what they fit told by shapes alone, and nothing built that misfits."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.lowrank.laws import (
    BOFT,
    IA3,
    OFT,
    DoRA,
    Full,
    GLoRA,
    Hadamard,
    InputBOFT,
    Kronecker,
    LowRank,
    OFTv2,
    Replacement,
    Rotation,
)
from sdlora.lowrank.laws.delta import factors, mapped

BASE = (24, 16, 3, 3)
OTHERS = [(24, 16), (24, 16, 1, 1), (16, 24, 3, 3), (25, 16, 3, 3), (24, 17, 3, 3), (24,)]


@dataclass(frozen=True)
class Spec:
    """What a file's header says of a tensor. It cannot be computed with."""

    shape: tuple[int, ...]
    dtype: str = "F16"


def _factor(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _low_rank() -> LowRank:
    return LowRank(_factor(2, 16, 3, 3), _factor(24, 2, 1, 1), 1.0)


LAWS: dict[str, Any] = {
    "lora": _low_rank(),
    "lora tucker": LowRank(_factor(2, 16, 1, 1), _factor(24, 2, 1, 1), 1.0, _factor(2, 2, 3, 3)),
    "loha": Hadamard(_factor(24, 2), _factor(2, 144), _factor(24, 2), _factor(2, 144), 1.0),
    "lokr": Kronecker(1.0, w1=_factor(4, 4), w2_a=_factor(6, 2), w2_b=_factor(2, 36)),
    "full": Full(_factor(*BASE)),
    "replacement": Replacement(_factor(*BASE)),
    "ia3": IA3(_factor(1, 16, 1, 1), on_input=True),
    "glora": GLoRA(_factor(16, 2), _factor(2, 16), _factor(24, 2), _factor(2, 16, 3, 3), 1.0),
    "oft": OFT(_factor(6, 4, 4), 0.1, _factor(24, 1, 1, 1)),
    "boft": BOFT(_factor(2, 4, 6, 6), 0.0),
    "oft_diag": Rotation(_factor(6, 4, 4)),
    "oftv2": OFTv2(_factor(36, 6), scaled=True),
    "boft inputs": InputBOFT(_factor(2, 36, 4, 4), _factor(1, 24)),
    "dora": DoRA(_low_rank(), _factor(24, 1, 1, 1)),
}
every_law = pytest.mark.parametrize("delta", LAWS.values(), ids=LAWS)


@every_law
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_factors_and_bases_are_computed_with_in_float32(delta: Any, dtype: torch.dtype) -> None:
    narrow = mapped(delta, lambda factor: factor.to(dtype))
    base = _factor(*BASE).half()
    found = narrow.weight(base)
    assert found.dtype == torch.float32 and found.shape == base.shape
    assert torch.equal(found, mapped(narrow, lambda factor: factor.float()).weight(base.float()))


@every_law
def test_the_delta_is_made_where_the_base_is(delta: Any) -> None:
    found = delta.weight(torch.empty(BASE, device="meta"))
    assert found.device.type == "meta" and found.shape == BASE


@every_law
def test_no_base_and_no_factor_is_written_to(delta: Any) -> None:
    base = _factor(*BASE)
    before = {name: factor.clone() for name, factor in factors(delta).items()}
    delta.weight(base)
    assert torch.equal(base, _factor(*BASE))
    assert all(torch.equal(factor, before[name]) for name, factor in factors(delta).items())


@every_law
def test_a_header_tells_as_much_as_the_tensors(delta: Any) -> None:
    header = mapped(delta, lambda factor: Spec(tuple(factor.shape)))
    assert all(isinstance(factor, Spec) for factor in factors(header).values())
    assert (header.name, header.linear, header.rank) == (delta.name, delta.linear, delta.rank)
    assert header.shape == delta.shape and header.fits(BASE)


@every_law
def test_what_does_not_fit_is_refused(delta: Any) -> None:
    misfits = [shape for shape in OTHERS if not delta.fits(shape)]
    assert len(misfits) >= 2
    for shape in misfits:
        with pytest.raises(SdloraError, match="does not fit a weight of shape"):
            delta.weight(torch.zeros(shape))


def test_outputs_alone_and_inputs_alone_fit_whatever_the_other_axis() -> None:
    fitting = {name: [shape for shape in OTHERS if law.fits(shape)] for name, law in LAWS.items() if law.fits(BASE)}
    assert fitting["ia3"] == [(24, 16), (24, 16, 1, 1), (25, 16, 3, 3)]
    assert fitting["oft"] == fitting["boft"] == [(24, 16), (24, 16, 1, 1), (24, 17, 3, 3)]
    assert fitting["oftv2"] == [(25, 16, 3, 3)]
    assert not any(fitting[name] for name in ("lora", "loha", "lokr", "full", "replacement", "glora", "dora"))


BIG = 10**9
BOMBS = {
    "lora": LowRank(Spec((1, BIG)), Spec((BIG, 1)), 1.0),  # type: ignore[arg-type]
    "loha": Hadamard(Spec((BIG, 1)), Spec((1, BIG)), Spec((BIG, 1)), Spec((1, BIG)), 1.0),  # type: ignore[arg-type]
    "lokr": Kronecker(1.0, w1=Spec((BIG, BIG)), w2=Spec((BIG, BIG))),  # type: ignore[arg-type]
    "lokr pair": Kronecker(1.0, w1_a=Spec((BIG, 1)), w1_b=Spec((1, BIG)), w2=Spec((1, 1))),  # type: ignore[arg-type]
    "full": Full(Spec((BIG, BIG))),  # type: ignore[arg-type]
    "glora": GLoRA(Spec((BIG, 1)), Spec((1, BIG)), Spec((BIG, 1)), Spec((1, BIG)), 1.0),  # type: ignore[arg-type]
    "oft": OFT(Spec((BIG, BIG, BIG)), 1.0),  # type: ignore[arg-type]
    "oftv2": OFTv2(Spec((1, BIG * (BIG - 1) // 2))),  # type: ignore[arg-type]
    "dora": DoRA(Full(Spec(BASE)), Spec((BIG, 1))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_shapes_are_compared_before_anything_is_multiplied(bomb: Any) -> None:
    """A Spec has no numbers, so that any arithmetic would be an AttributeError."""
    with pytest.raises(SdloraError, match="does not fit a weight of shape 24x16x3x3"):
        bomb.weight(torch.zeros(BASE))


def _refused(law: Any, *shapes: tuple[int, ...] | None, **more: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    named = {name: Spec(value) if isinstance(value, tuple) else value for name, value in more.items()}
    return law, [None if shape is None else Spec(shape) for shape in shapes], named


@pytest.mark.parametrize(
    "refused",
    [
        _refused(LowRank, (0, 16), (24, 0), alpha=1.0),
        _refused(LowRank, (2, 16), (24, 2), alpha=1.0, mid=(2, 3, 3, 3)),
        _refused(Hadamard, (24, 0), (0, 16), (24, 0), (0, 16), alpha=1.0),
        _refused(Hadamard, (24, 2), (3, 16), (24, 2), (2, 16), alpha=1.0),
        _refused(Hadamard, (24, 2), (2, 16), (24, 2), (2, 17), alpha=1.0),
        _refused(Hadamard, (2, 24), (2, 16), (2, 24), (2, 16), alpha=1.0, t1=(2, 2, 3, 3)),
        _refused(Hadamard, (24, 2), (2, 16), (24, 2), (2, 16), alpha=1.0, t1=(2, 2, 3, 3), t2=(2, 2, 3, 3)),
        _refused(Kronecker, alpha=1.0),
        _refused(Kronecker, alpha=1.0, w1=(4, 4)),
        _refused(Kronecker, alpha=1.0, w1=(4, 4), w2_a=(6, 2)),
        _refused(Kronecker, alpha=1.0, w1=(4, 4), w1_a=(4, 1), w1_b=(1, 4), w2=(6, 4)),
        _refused(Kronecker, alpha=1.0, w1=(4, 4, 1, 1), w2=(6, 4)),
        _refused(Kronecker, alpha=1.0, w1=(4, 4), w2=(6, 4), t2=(2, 2, 3, 3)),
        _refused(Kronecker, alpha=1.0, w1=(4, 4), w2_a=(6, 0), w2_b=(0, 4)),
        _refused(Full, ()),
        _refused(Replacement, ()),
        _refused(IA3, (), on_input=True),
        _refused(IA3, (2, 16), on_input=True),
        _refused(IA3, (0,), on_input=False),
        _refused(GLoRA, (16, 2), (2, 16), (24, 3), (3, 16), alpha=1.0),
        _refused(GLoRA, (16, 2), (2, 17), (24, 2), (2, 16), alpha=1.0),
        _refused(GLoRA, (16, 2), (2, 16), (24, 2), (2, 16), alpha=1.0, bm=(3, 3, 3, 3)),
        _refused(OFT, (6, 4, 5), constraint=0.0),
        _refused(OFT, (1, 6, 4, 4), constraint=0.0),
        _refused(OFT, (6, 0, 0), constraint=0.0),
        _refused(OFT, (6, 4, 4), constraint=0.0, rescale=(23, 1)),
        _refused(BOFT, (4, 6, 6), constraint=0.0),
        _refused(BOFT, (4, 4, 6, 6), constraint=0.0),
        _refused(BOFT, (2, 4, 5, 5), constraint=0.0),
        _refused(BOFT, (10**12, 4, 6, 6), constraint=0.0),
        _refused(Rotation, (6, 4)),
        _refused(OFTv2, (36, 7)),
        _refused(OFTv2, (36, 0)),
        _refused(InputBOFT, (2, 36, 4, 4), (2, 12)),
    ],
    ids=lambda refused: f"{refused[0].__name__}-{[getattr(spec, 'shape', None) for spec in refused[1]]}",
)
def test_factors_that_do_not_belong_together_are_refused_in_one_line(refused: Any) -> None:
    law, shapes, named = refused
    with pytest.raises(SdloraError, match="wanted|cannot be") as error:
        law(*shapes, **named)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(), (2, 24), (1, 1, 24, 1), (0,), (0, 3)])
def test_a_magnitude_that_is_no_axis_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SdloraError, match="magnitude"):
        DoRA(_low_rank(), Spec(shape))  # type: ignore[arg-type]


def test_laws_come_without_torch() -> None:
    code = "import sdlora.lowrank.laws, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
