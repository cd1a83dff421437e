"""The embedded model as it is shipped: its files, and that it edits."""

import pytest

from glassbox.flux_core.families import NANO_AUTOENCODER, NANO_KONTEXT
from glassbox.flux_core.nano import paths
from glassbox.flux_core.nano.drawing import draw, draw_pillow
from glassbox.flux_core.nano.evaluate import (
    NanoModel,
    autoencoder_db,
    draw_edits,
    load_nano,
    success,
)
from glassbox.flux_core.nano.world import EDITS
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights.files import open_checkpoint

KONTEXT = paths.NANO_KONTEXT_FILES
FILES = (KONTEXT.transformer, KONTEXT.autoencoder, *KONTEXT.text_encoders)


@pytest.fixture(scope="module")
def model() -> NanoModel:
    return load_nano()


def test_everything_together_is_small() -> None:
    folders = [
        file for folder in paths.FOLDER.iterdir() if folder.is_dir() for file in folder.iterdir()
    ]
    total = sum(file.stat().st_size for file in (*paths.FOLDER.iterdir(), *folders))
    assert total <= 30_000_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_name_their_family(path: object) -> None:
    assert open_checkpoint(path).metadata["glassbox_family"] == NANO_KONTEXT.name


def test_the_transformer_holds_flux_and_nothing_of_its_training() -> None:
    twin = build_flux(NANO_KONTEXT, device="meta")
    needed = {*twin.modulation.state_dict(), *twin.blocks.state_dict()}
    assert set(open_checkpoint(KONTEXT.transformer).shapes) == needed


def test_the_specs_are_those_of_the_families(model: NanoModel) -> None:
    assert model.network.spec == NANO_KONTEXT.transformer
    assert model.network.family is NANO_KONTEXT
    assert model.autoencoder.spec == NANO_AUTOENCODER


@pytest.mark.parametrize("action", EDITS)
def test_it_edits_held_out_scenes(model: NanoModel, action: str) -> None:
    """A small sample; `python -m flux_core.nano.evaluate` measures on a hundred of each kind."""
    edits = [*draw_edits(action, 1, 6, 1), *draw_edits(action, 2, 6, 1)]
    assert success(model, edits) >= 0.7


def test_it_does_what_is_said_and_not_something_likely(model: NanoModel) -> None:
    edits = draw_edits("recolour", 2, 12, 2)
    assert success(model, edits, shuffled=True) <= 0.2


def test_the_autoencoder_is_sharp_on_both_renderers(model: NanoModel) -> None:
    edits = draw_edits("recolour", 2, 12, 3)
    assert autoencoder_db(model, edits, draw) >= 30.0
    assert autoencoder_db(model, edits, draw_pillow) >= 30.0
