"""run_folder.py: a run that is to be replaced survives a kill at every step of the way out and back."""

from pathlib import Path

import pytest

from run_folder import REPLACED, RunFolder, RunRecord
from utils import UserError

RECORD = RunRecord(["finetune.py"], {}, 1, "abc", {}, {}, {}, written=["config.json", "model.safetensors"])


class Killed(Exception):
    """Stands for kill -9."""


def make_run(path: Path, content: str) -> dict[str, str]:
    """A finished run, and what is not of it; returns all files by name."""
    for name in ("config.json", "model.safetensors", "train.log", "notes.txt", "README.md"):
        path.mkdir(exist_ok=True)
        (path / name).write_text(content)
    for step in (5, 10):
        (path / f"checkpoint-{step}").mkdir()
        (path / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    (path / "runs").mkdir()
    (path / "runs" / "events").write_text(content)
    RECORD.write(path)
    return files(path)


def files(path: Path) -> dict[str, str]:
    return {p.relative_to(path).as_posix(): p.read_text() for p in path.rglob("*") if p.is_file()}


def killed_after(monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """Let `moves` renames happen, then kill."""
    left = [moves]
    for name in ("rename", "replace"):
        move = getattr(Path, name)

        def once(self: Path, target: Path, move=move) -> Path:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return move(self, target)

        monkeypatch.setattr(Path, name, once)


@pytest.mark.parametrize("moves", range(8))
def test_a_kill_on_the_way_out_loses_nothing(tmp_path, monkeypatch, moves):
    before = make_run(tmp_path / "out", "old")
    with monkeypatch.context() as patch:
        killed_after(patch, moves)
        if moves < 7:
            with pytest.raises(Killed):
                RunFolder(tmp_path / "out").set_aside()
        else:
            RunFolder(tmp_path / "out").set_aside()
            assert files(tmp_path / "out" / REPLACED).keys() == before.keys() - {"notes.txt", "README.md"}
    RunFolder(tmp_path / "out").clear_partial()
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("moves", range(8))
def test_a_kill_on_the_way_back_loses_nothing(tmp_path, monkeypatch, moves):
    folder = RunFolder(tmp_path / "out")
    before = make_run(folder.path, "old")
    folder.set_aside()
    RECORD.write(folder.path)  # the new run has begun
    (folder / "train.log").write_text("new")
    with monkeypatch.context() as patch:
        killed_after(patch, moves)
        if moves < 7:
            with pytest.raises(Killed):
                folder.restore_replaced()
        else:
            folder.restore_replaced()
    folder.clear_partial()
    assert files(folder.path) == before


def test_a_new_checkpoint_ends_the_old_run(tmp_path):
    folder = RunFolder(tmp_path / "out")
    make_run(folder.path, "old")
    folder.set_aside()
    RECORD.write(folder.path)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    folder.clear_partial()
    assert set(files(folder.path)) == {"run.json", "notes.txt", "README.md", "checkpoint-3/trainer_state.json"}


def test_what_is_no_run_is_not_replaced(tmp_path):
    folder = RunFolder(tmp_path / "out")
    make_run(folder.path, "old")
    with pytest.raises(UserError, match="holds a run already"):
        folder.refuse_if_taken(overwrite=False)
    (folder / "run.json").unlink()
    with pytest.raises(UserError, match="is not of a run of finetune.py"):
        folder.refuse_if_taken(overwrite=True)
    with pytest.raises(UserError, match="base model's own folder"):
        folder.refuse_base_model(str(folder.path / "."))
