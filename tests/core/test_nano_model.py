"""The embedded models as they are shipped: their files, and that they edit."""

from pathlib import Path

import pytest

from glassbox.flux_core.families import (
    NANO_AUTOENCODER,
    NANO_FLUX2_AUTOENCODER,
    NANO_KLEIN,
    NANO_KONTEXT,
)
from glassbox.flux_core.nano import paths
from glassbox.flux_core.transformer.flux import build_flux
from glassbox.flux_core.weights.checkpoint import open_checkpoint
from glassbox.tools.nano.drawing import draw, draw_pillow
from glassbox.tools.nano.evaluate import (
    NanoModel,
    autoencoder_db,
    draw_edits,
    load_nano,
    success,
)
from glassbox.tools.nano.world import EDITS, SAMPLED

FAMILIES = (NANO_KONTEXT, NANO_KLEIN)
AUTOENCODERS = {
    NANO_KONTEXT.name: NANO_AUTOENCODER,
    NANO_KLEIN.name: NANO_FLUX2_AUTOENCODER,
}


def _files(name: str) -> tuple[Path, ...]:
    files = paths.FILES[name]
    return files.transformer, files.autoencoder, *files.text_encoders


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def model(request: pytest.FixtureRequest) -> NanoModel:
    return load_nano(request.param)


@pytest.fixture(scope="module")
def klein() -> NanoModel:
    return load_nano(NANO_KLEIN)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_everything_together_is_small(family) -> None:
    tokenizers = {
        NANO_KONTEXT.name: (paths.CLIP_TOKENIZER, paths.T5_TOKENIZER),
        NANO_KLEIN.name: (paths.QWEN_TOKENIZER,),
    }[family.name]
    words = [file for folder in tokenizers for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in (*_files(family.name), *words)) <= 30_000_000


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_files_name_their_family(family) -> None:
    for path in _files(family.name):
        assert open_checkpoint(path).metadata["glassbox_family"] == family.name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_transformer_holds_flux_and_nothing_of_its_training(family) -> None:
    twin = build_flux(family, device="meta")
    needed = {*twin.modulation.state_dict(), *twin.blocks.state_dict()}
    assert set(open_checkpoint(paths.FILES[family.name].transformer).shapes) == needed


def test_the_specs_are_those_of_the_families(model: NanoModel) -> None:
    family = model.network.family
    assert family in FAMILIES
    assert model.network.spec == family.transformer
    assert model.autoencoder.spec == AUTOENCODERS[family.name]


@pytest.mark.parametrize("action", EDITS)
def test_it_edits_held_out_scenes(model: NanoModel, action: str) -> None:
    """A small sample; `python tools/run.py nano.evaluate` measures a hundred of each kind."""
    edits = [*draw_edits(action, 1, 6, 1), *draw_edits(action, 2, 6, 1)]
    assert success(model, edits) >= 0.7


@pytest.mark.parametrize("action", SAMPLED)
def test_the_klein_takes_what_a_second_picture_shows(klein: NanoModel, action: str) -> None:
    edits = [*draw_edits(action, 1, 6, 1, sampled=True), *draw_edits(action, 2, 6, 1, sampled=True)]
    assert success(klein, edits) >= 0.7


def test_it_does_what_is_said_and_not_something_likely(model: NanoModel) -> None:
    edits = draw_edits("recolour", 2, 12, 2)
    assert success(model, edits, shuffled=True) <= 0.2


def test_the_autoencoder_is_sharp_on_both_renderers(model: NanoModel) -> None:
    edits = draw_edits("recolour", 2, 12, 3)
    assert autoencoder_db(model, edits, draw) >= 30.0
    assert autoencoder_db(model, edits, draw_pillow) >= 30.0
