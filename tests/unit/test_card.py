"""The model card, and whose licence it names."""

import pytest

from tunewright.evaluate import card
from tunewright.models.load import ModelSource


@pytest.mark.parametrize(
    ("name", "text", "licence"),
    [
        ("README.md", "---\nbase: x\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("LICENSE.txt", "\n  MIT License\nCopyright ...", "MIT License"),
        ("README.md", "# No front matter\nlicense: none of this\n", "unknown: see the base model's own card"),
    ],
)
def test_licence_of_the_base(tmp_path, name, text, licence):
    (tmp_path / name).write_text(text)
    assert card.licence_of(ModelSource("m", str(tmp_path))) == licence


def test_licence_of_a_hub_id_is_not_guessed():
    assert card.licence_of(ModelSource("a/b", "a/b")).startswith("unknown")


def test_pico_states_its_licence():
    from tunewright.models.load import find

    assert card.licence_of(find("builtin:pico")) == "apache-2.0"
