"""The shared ComfyUI with tiny models in its folders."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from glassbox.tests.graph.server import Comfy


@pytest.fixture(scope="session")
def tiny_comfy(comfy: "Comfy") -> "Comfy":
    """ComfyUI with every tiny model to load."""
    from glassbox.tests.graph import tiny

    tiny.make_models(comfy.models_dir)
    return comfy


@pytest.fixture(scope="session")
def flux2_comfy(tiny_comfy: "Comfy") -> "Comfy":
    """The same with the tiny models of FLUX.2 beside those of FLUX.1."""
    from glassbox.tests.graph import tiny_flux2

    tiny_flux2.make_published(tiny_comfy.models_dir)
    return tiny_comfy
