"""What the tests share: a fixture for the hand-made dataset of toy_data.py; and in which order files are dealt to processes."""

from collections import Counter
from pathlib import Path

import pytest
from toy_data import write_dataset


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no process of pytest-xdist is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A data path that holds the dataset `Toy`."""
    return write_dataset(tmp_path / "data")
