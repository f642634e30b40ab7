"""What the tests share: datasets and models, and the order in which files are dealt to processes."""

import fcntl
import os
from collections import Counter
from pathlib import Path

import pytest
from toy_data import write_dataset


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no process of pytest-xdist is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a base model, made once for all processes of pytest-xdist."""
    from data_process import base_model

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with open(root / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "smollm2").exists():
            base_model.main(["smollm2", "--target", str(root / "smollm2")])
    return root / "smollm2"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A data path that holds the dataset `Toy`."""
    return write_dataset(tmp_path / "data")
