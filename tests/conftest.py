"""What the tests share: the hand-made dataset, the world that abuses break, a clock; and the order of the files."""

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_data import write_dataset

SECONDS = 60  # what takes longer hangs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no process of pytest-xdist is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


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
def clock() -> Iterator[None]:
    """Ends a command that waits for ever."""

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
