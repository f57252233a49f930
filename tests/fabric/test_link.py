"""The link's codec: the ends of what it can carry."""

from __future__ import annotations

import pytest

from vhostfc.fabric import link


@pytest.mark.parametrize("text", ["é" * 600, "x" * 1023 + "é", "𝕏" * 300])
@pytest.mark.parametrize("kind", [link.Note, link.Hello])
def test_a_text_that_is_too_long_is_cut_between_characters(kind: type[link.Note | link.Hello], text: str) -> None:
    message = link.decode(link.encode(kind(text)))
    assert isinstance(message, link.Note | link.Hello)
    cut = message.text if isinstance(message, link.Note) else message.name
    assert text.startswith(cut)
    assert 1020 < len(cut.encode()) <= 1024
