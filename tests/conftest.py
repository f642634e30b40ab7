"""What the tests share: a fixture for the hand-made dataset of toy_data.py."""

from pathlib import Path

import pytest
from toy_data import write_dataset


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A data path that holds the dataset `Toy`."""
    return write_dataset(tmp_path / "data")
