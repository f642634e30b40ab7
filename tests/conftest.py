"""What the tests share: datasets, models, the world that abuses break, a clock; and the order of the files."""

import fcntl
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toy_data import write_dataset

SECONDS = 60  # what takes longer hangs


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


@pytest.fixture(scope="session")
def abuse_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world of `abuse_world.py`, to be copied before it is broken."""
    from abuse_world import make_abuse_world

    return make_abuse_world(tmp_path_factory.mktemp("abuse"))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk with so many bytes of room; skipped where nothing can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(room: int) -> Path:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
            pytest.skip("only root can mount a disk")
        (place / "fill").write_bytes(bytes(2**18 - room))
        return place

    yield make
    subprocess.run(["umount", place], capture_output=True)


@pytest.fixture
def clock() -> Iterator[None]:
    """Ends a command that waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
