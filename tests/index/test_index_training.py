"""RQ-VAE training against an independent functional implementation; checkpoints, resumption, bad input."""

import argparse
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[2] / "index"))

import checkpoints
import generate_indices
import main as index_main
from commands import InputError, Interrupted
from extension import read_index
from models.quantiser import VectorQuantizer
from models.rqvae import RQVAE, RQVAEConfig
from trainer import Trainer, learning_rate_factor

INDEX = Path(__file__).resolve().parents[2] / "index"

SMALL = "--device cpu --num_emb_list 8 8 8 --sk_epsilons 0 0 0.003 --layers 32 16 --e_dim 4 --batch_size 50".split()
SMALL += "--epochs 6 --warmup_epochs 2 --eval_step 2 --lr_scheduler_type linear --weight_decay 1e-4".split()


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """120 clustered rows of 12 numbers."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(15, 12))[generator.integers(15, size=120)] + 0.2 * generator.normal(size=(120, 12))
    np.save(tmp_path / "D.emb-x-td.npy", rows.astype(np.float32))
    return tmp_path / "D.emb-x-td.npy"


def train(embeddings: Path, *flags: str) -> Path:
    """The folder of a small run."""
    return index_main.main(
        [*SMALL, "--data_path", str(embeddings), "--ckpt_dir", str(embeddings.parent / "ckpt"), *flags]
    )


def state_of(folder: Path, epoch: int = 5) -> dict:
    (path,) = folder.glob(f"epoch_{epoch}_*")
    return checkpoints.load_checkpoint(path)


# ---- an independent implementation of DESIGN.md section 5, on plain tensors ----


def mlp(x: torch.Tensor, weights: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    numbers = sorted({int(key.split(".")[2]) for key in weights if key.startswith(part + ".")})
    for number in numbers:
        x = x @ weights[f"{part}.mlp_layers.{number}.weight"].T + weights[f"{part}.mlp_layers.{number}.bias"]
        x = x if number == numbers[-1] else x.clamp(min=0)
    return x


def assign(rows: torch.Tensor, codes: torch.Tensor, epsilon: float) -> torch.Tensor:
    distances = ((rows[:, None] - codes[None]) ** 2).sum(-1)
    if epsilon == 0:
        return distances.argmin(1)
    high, low = distances.max(), distances.min()
    plan = torch.exp(-((distances - (high + low) / 2) / ((high - low) / 2 + 1e-5)).double() / epsilon)
    plan = plan / plan.sum()
    for _ in range(50):
        plan = plan / plan.sum(1, keepdim=True) / len(rows)
        plan = plan / plan.sum(0, keepdim=True) / len(codes)
    return plan.argmax(1)


def reference_loss(x: torch.Tensor, weights: dict[str, torch.Tensor], epsilons: list[float]) -> torch.Tensor:
    residual = latent = mlp(x, weights, "encoder")
    losses, total = [], 0
    for level, epsilon in enumerate(epsilons):
        codes = weights[f"rq.vq_layers.{level}.embedding.weight"]
        chosen = codes[assign(residual.detach(), codes.detach(), epsilon)]
        losses.append(((chosen - residual.detach()) ** 2).mean() + 0.25 * ((chosen.detach() - residual) ** 2).mean())
        through = residual + (chosen - residual).detach()
        residual = residual - through
        total = total + through
    assert latent.requires_grad
    return ((mlp(total, weights, "decoder") - x) ** 2).mean() + sum(losses) / len(losses)


def test_steps_equal_the_reference(embeddings: Path) -> None:
    """Five epochs after the first, step by step: losses, straight-through gradients, clipping, schedule, Sinkhorn."""
    folder = train(embeddings, "--eval_step", "1", "--save_limit", "9")
    first = state_of(folder, 0)
    weights = {name: value.clone().requires_grad_() for name, value in first["state_dict"].items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, weight_decay=1e-4)
    optimizer.load_state_dict(first["optimizer"])
    for group in optimizer.param_groups:
        group["fused"] = False
    x = torch.from_numpy(np.load(embeddings))
    step = 3
    for epoch in range(1, 6):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(2024 * 1_000_003 + epoch))
        for batch in order.split(50):
            factor = step / 6 if step < 6 else (18 - step) / 12
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * factor
            optimizer.zero_grad()
            reference_loss(x[batch], weights, [0, 0, 0.003]).backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            step += 1
        found = state_of(folder, epoch)["state_dict"]
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=2e-4, atol=2e-6, msg=f"{name}, epoch {epoch}")


def test_later_levels_send_nothing_back_through_the_residual() -> None:
    level = VectorQuantizer(4, 3, kmeans_init=False)
    rows = torch.randn(5, 3, requires_grad=True)
    chosen, _, _ = level(rows)
    (rows - chosen).sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_codebooks_start_at_kmeans_centres_or_uniform() -> None:
    rows = torch.cat([torch.randn(30, 2) * 0.01 + centre for centre in torch.tensor([[0.0, 9], [9, 0], [5, 5]])])
    level = VectorQuantizer(3, 2)
    level(rows)
    means = torch.stack([part.mean(0) for part in rows.split(30)])
    assert torch.cdist(level.embedding.weight, means).min(0).values.max() < 1e-4
    uniform = VectorQuantizer(10, 2, kmeans_init=False).embedding.weight
    assert uniform.abs().max() <= 0.1 and uniform.unique().numel() == 20


def test_kmeans_with_fewer_rows_than_codes_gives_different_codes() -> None:
    level = VectorQuantizer(8, 2)
    level(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
    assert len(level.embedding.weight.unique(dim=0)) == 8
    assert torch.isfinite(level.embedding.weight).all()


def test_parameter_names_are_the_formats() -> None:
    config = RQVAEConfig(num_emb_list=[4, 4], sk_epsilons=[0, 0], layers=[8, 6], e_dim=2)
    names = set(RQVAE(5, config).state_dict())
    sides = {
        f"{side}.mlp_layers.{n}.{kind}"
        for side in ("encoder", "decoder")
        for n in (1, 4, 7)
        for kind in ("weight", "bias")
    }
    assert names == sides | {f"rq.vq_layers.{level}.embedding.weight" for level in (0, 1)}
    with_bn = RQVAEConfig(num_emb_list=[4, 4], sk_epsilons=[0, 0], layers=[8, 6], e_dim=2, bn=True)
    assert {"encoder.mlp_layers.2.running_mean", "encoder.mlp_layers.5.weight"} <= set(RQVAE(5, with_bn).state_dict())


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_schedule(kind: str) -> None:
    factors = [learning_rate_factor(step, 10, 110, kind) for step in (0, 5, 10, 60, 110)]
    assert factors == [0, 0.5, 1, *((1, 1) if kind == "constant" else (0.5, 0))]


def test_training_reports_how_even_the_hard_assignments_are(embeddings: Path, capsys: pytest.CaptureFixture) -> None:
    train(embeddings)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 6/6")]
    found = re.search(r"Sinkhorn on level 3: (\d+) of 8 codes, entropy ([\d.]+) bits, largest ([\d.]+) × even", line)
    assert 1 <= int(found[1]) <= 8 and 0 <= float(found[2]) <= 3 and 1 <= float(found[3]) <= 8


def test_loss_goes_down_and_files_are_kept(embeddings: Path) -> None:
    folder = train(embeddings, "--epochs", "60", "--eval_step", "5", "--save_limit", "2", "--lr", "3e-3")
    names = {path.name for path in folder.iterdir()}
    assert {"best_loss_model.pth", "best_collision_model.pth"} <= names
    kept = checkpoints.epoch_files(folder)
    assert kept[-1][0] == 59 and kept[-2][0] == 54 and 2 <= len(kept) <= 4
    best = checkpoints.load_checkpoint(folder / "best_collision_model.pth")
    assert best["best_collision_rate"] == pytest.approx(min(rate for _, rate, _ in kept), abs=1e-4)
    x = torch.from_numpy(np.load(embeddings))
    model = checkpoints.model_from_checkpoint(state_of(folder, 59), "x").eval()
    assert functional.mse_loss(model(x, use_sk=False)[0], x) < 0.7 * x.var()


def test_a_stopped_run_resumes_to_the_same_weights(embeddings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = state_of(train(embeddings, "--dropout_prob", "0.1"))
    original = Trainer.train_epoch

    def stop_in_third(self: Trainer, epoch: int) -> tuple[float, float]:
        if epoch == 2:
            self._note_signal(15, None)
        return original(self, epoch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="--resume"):
        patch.setattr(Trainer, "train_epoch", stop_in_third)
        train(embeddings, "--dropout_prob", "0.1", "--ckpt_dir", str(embeddings.parent / "stopped"))
    (stopped,) = (embeddings.parent / "stopped").iterdir()
    assert (stopped / "last_model.pth").exists()
    torch.manual_seed(99)
    assert index_main.main(["--resume", str(stopped), "--device", "cpu"]) == stopped
    resumed = state_of(stopped)
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert resumed["best_loss"] == whole["best_loss"]


@pytest.mark.parametrize("flags", [[], ["--preset", "fast", "--batch_size", "50", "--eval_step", "2", "--epochs", "6"]])
def test_a_killed_run_goes_on_from_its_last_evaluation(embeddings: Path, flags: list[str]) -> None:
    whole = train(embeddings, "--dropout_prob", "0.1", *flags)
    killed = embeddings.parent / "killed"
    killed.mkdir()
    (kept,) = whole.glob("epoch_3_*")
    (killed / kept.name).write_bytes(kept.read_bytes())
    torch.manual_seed(99)
    assert index_main.main(["--resume", str(killed), "--device", "cpu"]) == killed
    wanted, found = state_of(whole), state_of(killed)
    assert all(torch.equal(found["state_dict"][name], value) for name, value in wanted["state_dict"].items())
    assert found["best_loss"] == wanted["best_loss"]


def original_checkpoint(path: Path, *, extra: object = None) -> dict:
    """A checkpoint as the original writes it: its flags, no `resume` part; weights by plain torch."""
    torch.manual_seed(5)
    shapes = {"encoder": [12, 32, 16, 4], "decoder": [4, 16, 32, 12]}
    weights = {}
    for side, sizes in shapes.items():
        for number, (before, after) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            weights[f"{side}.mlp_layers.{3 * number + 1}.weight"] = torch.randn(after, before) / before**0.5
            weights[f"{side}.mlp_layers.{3 * number + 1}.bias"] = torch.zeros(after)
    for level in range(3):
        weights[f"rq.vq_layers.{level}.embedding.weight"] = torch.randn(8, 4)
    order = (
        [k for k in weights if "encoder" in k] + [k for k in weights if "rq" in k] + [k for k in weights if "dec" in k]
    )
    weights = {key: weights[key] for key in order}
    parameters = [torch.nn.Parameter(value.clone()) for value in weights.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    sum((p**2).sum() for p in parameters).backward()
    optimizer.step()
    args = argparse.Namespace(
        lr=1e-3, epochs=5, batch_size=50, num_workers=4, eval_step=2, learner="AdamW", lr_scheduler_type="constant",
        warmup_epochs=1, data_path=str(path.parent / "D.emb-x-td.npy"), weight_decay=0.0, dropout_prob=0.0, bn=False,
        loss_type="mse", kmeans_init=True, kmeans_iters=100, sk_epsilons=[0.0, 0.0, 0.0], sk_iters=50, device="cuda:0",
        num_emb_list=[8, 8, 8], e_dim=4, quant_loss_weight=1.0, beta=0.25, layers=[32, 16], save_limit=5, ckpt_dir="x",
    )  # fmt: skip
    content = {
        "args": args,
        "epoch": 1,
        "best_loss": 0.5,
        "best_collision_rate": 0.1,
        "state_dict": weights,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content | ({"extra": extra} if extra is not None else {}), path)
    return content


def test_an_original_checkpoint_goes_on_without_a_second_start(
    embeddings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = embeddings.parent / "epoch_1_collision_0.1000_model.pth"
    content = original_checkpoint(path)
    monkeypatch.setattr(VectorQuantizer, "initialise", lambda *_: pytest.fail("initialised again"))
    seen = []
    original = Trainer.train_epoch

    def watch(self: Trainer, epoch: int) -> tuple[float, float]:
        seen.append((epoch, self.scheduler.get_last_lr()[0], self.scheduler.last_epoch))
        if epoch == 2:
            for name, value in content["state_dict"].items():
                assert torch.equal(self.model.state_dict()[name], value)
        return original(self, epoch)

    monkeypatch.setattr(Trainer, "train_epoch", watch)
    index_main.main(["--resume", str(path), "--device", "cpu"])
    assert seen == [(2, 1e-3, 6), (3, 1e-3, 9), (4, 1e-3, 12)]


def test_an_original_checkpoint_generates_indices(embeddings: Path) -> None:
    """Before any round the codes are the nearest by a plain implementation; in the end no two items share an index."""
    path = embeddings.parent / "best_collision_model.pth"
    weights = original_checkpoint(path)["state_dict"]
    residual = mlp(torch.from_numpy(np.load(embeddings)), weights, "encoder")
    wanted = []
    for level in range(3):
        codes = weights[f"rq.vq_layers.{level}.embedding.weight"]
        wanted.append(assign(residual, codes, 0))
        residual = residual - codes[wanted[-1]]
    flags = ["--ckpt_path", str(path), "--device", "cpu", "--overwrite", "--output_file"]
    nearest, final = embeddings.parent / "nearest.json", embeddings.parent / "D.index.json"
    generate_indices.main([*flags, str(nearest), "--max_rounds", "0", "--allow_conflicts"])
    assert np.array_equal(read_index(nearest), torch.stack(wanted, 1).numpy())
    generate_indices.main([*flags, str(final)])
    assert len(np.unique(read_index(final), axis=0)) == 120 > len(np.unique(read_index(nearest), axis=0))


class Foreign:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch /tmp/lcrec-foreign-object-ran",))


def test_foreign_objects_are_refused_and_never_run(embeddings: Path) -> None:
    marker = Path("/tmp/lcrec-foreign-object-ran")
    marker.unlink(missing_ok=True)
    path = embeddings.parent / "bad.pth"
    original_checkpoint(path, extra=Foreign())
    with pytest.raises(InputError, match="refused.*system"):
        checkpoints.load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"no zip", {"state_dict": {}}, [1, 2]])
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(InputError, match=r"x\.pth"):
        checkpoints.load_checkpoint(path)


def test_flags_that_do_not_fit_the_weights_are_refused(embeddings: Path) -> None:
    path = embeddings.parent / "x.pth"
    content = original_checkpoint(path)
    content["args"].num_emb_list = [8, 8, 9]
    with pytest.raises(InputError, match="do not fit"):
        checkpoints.model_from_checkpoint(content, path)


BAD_ARRAYS = {
    "not finite": np.array([[1.0, np.nan], [2, 3]], dtype=np.float32),
    "not finite .as float32": np.array([[1e300, 1], [2, 3]]),
    "the same": np.ones((5, 3), dtype=np.float32),
    "shape": np.ones(7, dtype=np.float32),
    "dtype int64": np.arange(12).reshape(3, 4),
    "empty": np.empty((0, 5), dtype=np.float32),
    "not a readable": np.array([[None, 1]], dtype=object),
}


@pytest.mark.parametrize("reason", BAD_ARRAYS)
def test_bad_embeddings_end_with_one_line(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, BAD_ARRAYS[reason], allow_pickle=True)
    with pytest.raises(InputError, match=reason.split(" .")[0]):
        index_main.main([*SMALL, "--data_path", str(path), "--ckpt_dir", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--data_path", "missing.npy"], "no such file"),
        (["--data_path", ""], "data_path"),
        (["--ckpt_dir", ""], "ckpt_dir"),
        (["--sk_epsilons", "0", "0.003"], "sk_epsilons"),
        (["--learner", "magic"], "magic"),
        (["--lr", "nan"], "lr"),
        (["--device", "abacus"], "abacus"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_bad_flags_end_with_one_line(embeddings: Path, flags: list[str], word: str) -> None:
    with pytest.raises(InputError, match=word):
        train(embeddings, *flags)


def test_resume_refuses_other_flags_and_other_embeddings(embeddings: Path) -> None:
    folder = train(embeddings)
    with pytest.raises(InputError, match="--lr"):
        index_main.main(["--resume", str(folder), "--lr", "0.5"])
    other = embeddings.parent / "other.npy"
    np.save(other, np.load(embeddings)[::-1])
    with pytest.raises(InputError, match="not the embeddings"):
        index_main.main(["--resume", str(folder), "--data_path", str(other), "--epochs", "8", "--device", "cpu"])


def test_from_the_folder_and_a_user_mistake_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "main.py", "--data_path", "nowhere.npy", "--ckpt_dir", str(tmp_path), "--device", "cpu"]
    result = subprocess.run(command, cwd=INDEX, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: nowhere.npy") and result.stderr.count("\n") == 1


def test_components_start_reconstructs_like_pca(embeddings: Path) -> None:
    from embeddings import Embeddings
    from models.pca import start_at_components
    from start import mean_and_covariance

    rows = Embeddings(embeddings, torch.device("cpu"))
    model = RQVAE(12, RQVAEConfig(num_emb_list=[4], sk_epsilons=[0], layers=[32, 16], e_dim=4))
    assert start_at_components(model, *mean_and_covariance(rows)) == 4
    x = np.load(embeddings).astype(np.float64)
    _, _, axes = np.linalg.svd(x - x.mean(0), full_matrices=False)
    wanted = (x - x.mean(0)) @ axes[:4].T @ axes[:4] + x.mean(0)
    found = model.decoder(model.encoder(torch.from_numpy(x).float())).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_fast_preset_trains(embeddings: Path) -> None:
    flags = (
        "--device cpu --preset fast --num_emb_list 16 16 16 --layers 32 16 --e_dim 4 --epochs 4 --batch_size 32".split()
    )
    folder = index_main.main([*flags, "--data_path", str(embeddings), "--ckpt_dir", str(embeddings.parent / "fast")])
    state = state_of(folder, 3)
    assert math.isfinite(state["best_loss"]) and state["best_collision_rate"] < 0.5
