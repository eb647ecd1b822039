"""What LoRAs that go together are made for, and the texts that name them with weights."""

from pathlib import Path

import pytest

from sdlora.errors import SdloraError
from sdlora.formats.receipt import Receipt
from sdlora.workbench.parts import Part, parse_part, shared_architecture, with_blocks


def receipts(*made_for: str) -> list[Receipt]:
    return [Receipt(Path(f"{i}.safetensors"), 1, made_for=tuple(told.split())) for i, told in enumerate(made_for)]


@pytest.mark.parametrize(
    ("made_for", "shared"),
    [(["sd1 sd2", "sd2"], "sd2"), (["sd2 sd1", "", "sd1 sd2"], "sd2"), (["", "sd1"], None)],
)
def test_the_architecture_is_one_that_all_are_made_for(made_for: list[str], shared: str | None) -> None:
    found = shared_architecture(receipts(*made_for))
    assert (found and found.name) == shared


def test_two_for_different_ones_are_named_with_the_evidence() -> None:
    odd = [*receipts("sd1"), Receipt(Path("b"), 1, made_for=("sdxl",), evidence=("a", "b"))]
    with pytest.raises(
        SdloraError, match=r"^0\.safetensors is for SD 1\.x and b is for SDXL \(a, b\); take LoRAs of one"
    ):
        shared_architecture(odd)
    found = shared_architecture(odd, partial=True)
    assert found is not None and found.name == "sd1"


def test_three_that_share_something_two_by_two_only_are_refused_even_if_a_fourth_tells_nothing() -> None:
    with pytest.raises(
        SdloraError, match=r"1\.safetensors is for SD 2\.x or SDXL and 2\.safetensors is for SDXL or SD 1\.x"
    ):
        shared_architecture(receipts("sd1 sd2", "sd2 sdxl", "sdxl sd1", ""))


def test_names_may_hold_dots_and_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b-v1.5").mkdir()
    part = parse_part("a:b-v1.5:0.5:0.25")
    assert part == Part(Path("a:b-v1.5"), 0.5, 0.25)
    assert parse_part("a:b.safetensors:2") == Part(Path("a:b.safetensors"), 2.0, 2.0)
    (weighed,) = with_blocks([part], ["a:b-v1.5=unet.*:0.5"])
    assert weighed.blocks == {"unet.*": 0.5}
    with pytest.raises(SdloraError, match=r"nearest: a:b-v1\.5"):
        with_blocks([part], ["a:b-v1=unet.*:0.5"])
