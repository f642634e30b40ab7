"""One of RecBole's sequential models, trained and asked for its lists. `baselines.py` starts it in RecBole's own environment.

    python benchmarks/recbole_run.py ../Office.yaml        # in the folder of settings.json, where everything is written

`settings.json` is `{"model", "dataset", "recbole": {setting: value}}`. Training stops by RecBole's own rule; the epoch with the
best validation metric gives the lists of both splits: `valid.predictions.jsonl` and `test.predictions.jsonl`, of the form that
test.py writes. `trained.json` has parameters, seconds, epochs and versions; `recbole.log` is RecBole's log.
BERT4Rec learns from masked histories alone. RecBole gives it the histories without their targets, so that it would never see the
last training item of a user; here the target stands at the end of a training history, as in the BERT4Rec paper.
"""

import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.logger import RemoveColorFilter

DEPTH = 20  # items of a list


def put_targets_in(rows) -> None:
    """Append every row's target to its history; the oldest item goes where there is no place."""
    sequences, lengths = rows["item_id_list"], rows["item_length"]
    full = lengths == sequences.shape[1]
    sequences[full] = sequences[full].roll(-1, 1)
    places = torch.where(full, lengths - 1, lengths)
    sequences[torch.arange(len(sequences)), places] = rows["item_id"]
    rows["item_length"] = places + 1


class Best:
    """Keeps the weights of the best epoch, and says on standard output how far the training is."""

    def __init__(self, model, name: str):
        self.model, self.name = model, name
        self.score, self.epoch, self.epochs, self.weights = float("-inf"), 0, 0, {}
        self.began = self.said = time.time()

    def __call__(self, epoch: int, score: float) -> None:
        self.epochs = epoch + 1
        if score > self.score:  # as RecBole's early stopping compares
            self.score, self.epoch = score, self.epochs
            self.weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        if (terminal := sys.stdout.isatty()) or time.time() - self.said > 60:
            self.said = time.time()
            text = f"{self.name}: epoch {self.epochs}, {self.said - self.began:.0f} s"
            print(f"{text}; validation {score:.4f}, best {self.score:.4f}", end="\r" if terminal else "\n", flush=True)


@torch.no_grad()
def write_lists(model, dataset, part, path: Path) -> None:
    """The `DEPTH` best of all items for every row of a split, one line each."""
    model.eval()
    number = 0
    with open(path, "w", encoding="utf-8") as file:
        for rows, _, _, targets in part:
            scores = model.full_sort_predict(rows.to(model.device))
            scores[:, 0] = -torch.inf  # padding is no item
            best = scores.topk(min(DEPTH, scores.shape[1] - 1))
            lists = dataset.id2token("item_id", best.indices.cpu().numpy())
            users = dataset.id2token("user_id", rows["user_id"].cpu().numpy())
            truths = dataset.id2token("item_id", targets.cpu().numpy())
            for user, truth, items, values in zip(users, truths, lists, best.values.tolist(), strict=True):
                record = {"prompt_id": 0, "sample": number, "user": user, "target": int(truth)}
                record |= {"items": [int(item) for item in items], "scores": [round(value, 6) for value in values]}
                file.write(json.dumps(record) + "\n")
                number += 1


def main() -> None:
    log = logging.FileHandler("recbole.log", "w")
    log.addFilter(RemoveColorFilter())
    logging.basicConfig(level=logging.INFO, handlers=[log], format="%(asctime)s %(message)s")
    settings = json.loads(Path("settings.json").read_text(encoding="utf-8"))
    choices = {**settings["recbole"], "use_gpu": torch.cuda.is_available(), "checkpoint_dir": "."}
    config = Config(settings["model"], settings["dataset"], config_file_list=[sys.argv[1]], config_dict=choices)
    config["data_path"] = str(Path(sys.argv[1]).parent)  # RecBole would take its own copy for the name ml-100k
    logging.info(config)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    if settings["model"] == "BERT4Rec":
        put_targets_in(train.dataset.inter_feat)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train.dataset).to(config["device"])
    torch.autograd.set_detect_anomaly(False)  # RecBole's SINE turns it on for all models: two fifths of the time
    best = Best(model, settings["model"])
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train, valid, saved=False, callback_fn=best)
    seconds = time.time() - best.began
    model.load_state_dict(best.weights)
    for split, part in (("valid", valid), ("test", test)):
        write_lists(model, dataset, part, Path(f"{split}.predictions.jsonl"))
    trained = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "epochs": best.epochs,
        "best_epoch": best.epoch,
        "validation_by_recbole": best.score,
        "device": str(config["device"]),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("recbole", "torch", "numpy")},
    }
    Path("trained.json").write_text(json.dumps(trained, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
