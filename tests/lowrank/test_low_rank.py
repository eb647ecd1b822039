"""The law of a low-rank delta: its scale, its shape, its weight; and what an adapter hands out."""

import lycoris.functional.locon as locon
import pytest
import torch

from sdlora.errors import SdloraError
from sdlora.lowrank.adapter import Adapter
from sdlora.lowrank.laws import LowRank


def test_weight_is_scale_times_up_down_in_float32() -> None:
    down, up = torch.randn(4, 6).half(), torch.randn(5, 4).half()
    delta = LowRank(down, up, alpha=2.0)
    base = torch.zeros(5, 6, dtype=torch.bfloat16)
    assert (delta.rank, delta.scale, delta.shape) == (4, 0.5, (5, 6))
    assert delta.weight(base).dtype == torch.float32
    torch.testing.assert_close(delta.weight(base), 0.5 * up.float() @ down.float())


def test_a_convolution_equals_down_then_up() -> None:
    down, up = torch.randn(4, 6, 3, 3), torch.randn(5, 4, 1, 1)
    x = torch.randn(1, 6, 7, 7)
    delta = LowRank(down, up, alpha=8.0)
    assert delta.shape == (5, 6, 3, 3)
    weight = delta.weight(torch.zeros(5, 6, 3, 3))
    two_steps = 2 * torch.conv2d(torch.conv2d(x, down), up)
    torch.testing.assert_close(torch.conv2d(x, weight), two_steps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3)])
@pytest.mark.parametrize("alpha", [4.0, 1.0, 10.0])
def test_a_tucker_core_is_lycoris_core(kernel: tuple[int, int], alpha: float) -> None:
    down, up, mid = torch.randn(4, 6, 1, 1), torch.randn(5, 4, 1, 1), torch.randn(4, 4, *kernel)
    wanted = locon.diff_weight(down.double(), up.double(), mid.double(), gamma=alpha / 4)
    for flat in (False, True):
        delta = LowRank(down.flatten(1) if flat else down, up.flatten(1) if flat else up, alpha, mid)
        assert (delta.rank, delta.shape) == (4, (5, 6, *kernel))
        found = delta.weight(torch.zeros(5, 6, *kernel))
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_tucker_core_stands_between_down_and_up() -> None:
    down, up, mid = torch.randn(4, 6, 1, 1), torch.randn(5, 4, 1, 1), torch.randn(4, 4, 3, 3)
    x = torch.randn(1, 6, 7, 7)
    weight = LowRank(down, up, 8.0, mid).weight(torch.zeros(5, 6, 3, 3))
    three_steps = 2 * torch.conv2d(torch.conv2d(torch.conv2d(x, down), mid), up)
    torch.testing.assert_close(torch.conv2d(x, weight), three_steps, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mid", [(4, 4), (4, 3, 3, 3), (3, 3, 3, 3), (4, 4, 3)])
def test_a_core_that_does_not_join_the_pair_is_refused(mid: tuple[int, ...]) -> None:
    with pytest.raises(SdloraError, match="no core"):
        LowRank(torch.zeros(4, 6), torch.zeros(5, 4), 1.0, torch.zeros(mid))


def test_linear_and_pointwise_factors_fit_each_other() -> None:
    linear = LowRank(torch.randn(2, 6), torch.randn(5, 2), 2.0)
    pointwise = LowRank(linear.down[..., None, None], linear.up[..., None, None], 2.0)
    for delta in (linear, pointwise):
        assert delta.fits((5, 6)) and delta.fits((5, 6, 1, 1))
        assert not delta.fits((6, 5)) and not delta.fits((5, 6, 3, 3))
        assert delta.weight(torch.zeros(5, 6, 1, 1)).shape == (5, 6, 1, 1)
    assert torch.equal(linear.weight(torch.zeros(5, 6)), pointwise.weight(torch.zeros(5, 6)))


def test_a_single_output_is_not_taken_for_a_trailing_one() -> None:
    delta = LowRank(torch.randn(2, 1), torch.randn(1, 2), 2.0)
    assert delta.fits((1, 1)) and not delta.fits((1, 2))


def test_a_weight_it_does_not_fit_is_refused() -> None:
    with pytest.raises(SdloraError, match="5x6.*5x7"):
        LowRank(torch.randn(2, 6), torch.randn(5, 2), 2.0).weight(torch.zeros(5, 7))


@pytest.mark.parametrize(
    ("down", "up"),
    [((2, 6), (5, 3)), ((2,), (5, 2)), ((2, 6, 3), (5, 2)), ((2, 6, 3, 3), (5, 2, 3, 3)), ((0, 6), (5, 0))],
)
def test_factors_that_are_no_pair_are_refused(down: tuple[int, ...], up: tuple[int, ...]) -> None:
    with pytest.raises(SdloraError, match="no low-rank pair"):
        LowRank(torch.zeros(down), torch.zeros(up), 1.0)


def test_an_adapter_tells_its_components_apart() -> None:
    delta = LowRank(torch.zeros(1, 2), torch.zeros(2, 1), 1.0)
    adapter = Adapter({"text_encoder.a": delta, "text_encoder_2.a": delta, "unet.a.b": delta})
    assert list(adapter.component("text_encoder")) == ["text_encoder.a"]
    assert list(adapter.component("unet")) == ["unet.a.b"]
    assert adapter.component("vae") == {} and adapter.metadata == {}
