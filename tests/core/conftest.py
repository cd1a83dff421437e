"""Small language models that the tests of text encoders share."""

import pytest

from glassbox.tests.parity import text_language_samples as samples
from glassbox.tests.parity.text_language_samples import LanguageKit


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> LanguageKit:
    return samples.qwen_kit(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> LanguageKit:
    return samples.mistral_kit(tmp_path_factory.mktemp("mistral"))
