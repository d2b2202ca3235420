"""Skips what needs the conversations or VADER where their packages (extra `smollm2`) are absent."""

import pytest


@pytest.fixture(scope="session")
def packages():
  pytest.importorskip("chatterbot_corpus")
  pytest.importorskip("vaderSentiment")
