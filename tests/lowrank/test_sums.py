"""A change in two parts: a law, and a residue that is sparse or whole."""

import pytest
import torch
from safetensors.torch import save_file

from sdlora.errors import SdloraError
from sdlora.formats.architectures import sd1
from sdlora.formats.read import read
from sdlora.lowrank.laws import Sparse

STEM = "lora_unet_down_blocks_0_resnets_0_conv1"
PATH = "unet.down_blocks.0.resnets.0.conv1"


def test_the_numbers_are_added_at_their_places(tmp_path) -> None:
    """As torch's own sparse tensors unfold, from the flat form that LyCORIS' extraction saves."""
    down, up = torch.randn(4, 320, 3, 3), torch.randn(320, 4, 1, 1)
    sparse = torch.where(torch.rand(320, 2880) < 0.001, torch.randn(320, 2880), 0)
    coordinates = sparse.to_sparse().coalesce()
    tensors = {
        f"{STEM}.lora_down.weight": down,
        f"{STEM}.lora_up.weight": up,
        f"{STEM}.alpha": torch.tensor(2.0),
        f"{STEM}.bias_indices": coordinates.indices().to(torch.int16),
        f"{STEM}.bias_values": coordinates.values(),
        f"{STEM}.bias_size": torch.tensor([320, 2880], dtype=torch.int16),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", sd1())
    assert receipt.complete and receipt.laws == {"lora + sparse": 1}
    wanted = 0.5 * up.flatten(1).double() @ down.flatten(1).double() + sparse.double()
    delta = adapter.deltas[PATH].weight(torch.zeros(320, 320, 3, 3))
    assert (delta.double().flatten(1) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(("place", "size"), [(9, (5, 6)), (-1, (5, 6)), (0, (6, 5)), (0, (5, 7)), (0, (0, 6))])
def test_places_beyond_the_weight_are_refused(place: int, size: tuple[int, int]) -> None:
    delta = Sparse(torch.tensor([[place], [0]]), torch.ones(1), torch.tensor(size))
    with pytest.raises(SdloraError, match="residual of size"):
        delta.weight(torch.zeros(5, 6))


@pytest.mark.parametrize("shape", [(320, 320, 3, 3), (320, 2880), (320,)])
def test_a_bias_beside_a_law_is_of_the_weight_or_of_the_outputs_by_its_shape(tmp_path, shape) -> None:
    """A1111's: both are scaled like the change."""
    down, up, bias = torch.randn(4, 320, 3, 3), torch.randn(320, 4, 1, 1), torch.randn(shape)
    tensors = {f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up, f"{STEM}.bias": bias}
    save_file(tensors | {f"{STEM}.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors")
    adapter, receipt = read(tmp_path / "a.safetensors", sd1())
    assert receipt.complete and receipt.alphas() == "alpha 2"
    wanted = 0.5 * up.flatten(1).double() @ down.flatten(1).double()
    if len(shape) > 1:
        wanted = wanted + 0.5 * bias.reshape(320, -1).double()
    else:
        assert torch.equal(adapter.deltas[f"{PATH}.bias"].weight(torch.zeros(320)), bias * 0.5)
    delta = adapter.deltas[PATH].weight(torch.zeros(320, 320, 3, 3))
    assert (delta.double().flatten(1) - wanted).abs().max() < 1e-5
