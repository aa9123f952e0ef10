"""One host, trained once for all tests of this folder that need one that has learnt something."""

from pathlib import Path

import pytest

from tests.graft.trained import train_host


@pytest.fixture(scope="session")
def trained_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_host(tmp_path_factory.mktemp("hosts") / "host", steps=60)
