"""RecBole's files of a dataset: by hand, and as RecBole's own loader reads them."""

import json
import subprocess

import pytest
from toy_data import INTERS, ITEMS, write_dataset

from benchmarks.baselines import recbole_python
from data_process import to_recbole
from utils import UserError

PROBE = """
import json, sys
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec

def loaded(settings):
    config = Config(model="SASRec", dataset="Toy", config_file_list=[sys.argv[1]], config_dict={"use_gpu": False, **settings})
    dataset = create_dataset(config)
    parts = data_preparation(config, dataset)
    loss = SASRec(config, parts[0].dataset).calculate_loss(next(iter(parts[0])))
    found = {"loss": float(loss), "items": dataset.item_num - 1}
    for split, part in zip(("train", "valid", "test"), parts):
        rows = part.dataset.inter_feat
        name = lambda field, value: dataset.id2token(field, value)
        found[split] = [
            [name("user_id", u), [int(i) for i in name("item_id", h[:n])], int(name("item_id", t))]
            for u, h, n, t in zip(*(rows[f].numpy() for f in ("user_id", "item_id_list", "item_length", "item_id")))
        ]
    return found

own = {"benchmark_filename": None, "alias_of_item_id": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
json.dump([loaded({}), loaded(own)], open(sys.argv[2], "w"))
"""


def expected(split: str, longest: int) -> list[list]:
    """(user, history, target) of the toy dataset's split, written down from the definition."""
    rows = []
    for user, items in INTERS.items():
        known = {"train": items[:-2], "valid": items[:-1], "test": items}[split]
        places = range(1, len(known)) if split == "train" else [len(known) - 1]
        rows += [[user, known[:place][-longest:], known[place]] for place in places]
    return rows


def test_files_by_hand(toy, tmp_path):
    to_recbole.main(
        ["--data_path", str(toy), "--dataset", "Toy", "--target", str(tmp_path / "r"), "--max_his_len", "2"]
    )
    folder = tmp_path / "r/Toy"
    assert (folder / "Toy.test.inter").read_text().splitlines() == [
        "user_id:token\titem_id_list:token_seq\titem_id:token",
        "0\t2 3\t4",
        "1\t5 4\t3",
        "2\t0 5\t1",
        "3\t0 2\t4",
    ]
    assert (folder / "Toy.train.inter").read_text().splitlines()[1:] == ["0\t0\t1", "0\t0 1\t2", "2\t2\t0"] + [
        "3\t1\t3",
        "3\t1 3\t5",
        "3\t3 5\t0",
    ]
    assert (folder / "Toy.inter").read_text().splitlines()[1:4] == ["0\t0\t0", "0\t1\t1", "0\t2\t2"]
    assert (folder / "Toy.item").read_text().splitlines()[3] == "2\tNotebook, A5\t\t"


def test_refusals(toy):
    flags = ["--data_path", str(toy), "--target", str(toy.parent / "r"), "--dataset"]
    with pytest.raises(UserError, match="must be a plain name"):
        to_recbole.main([*flags, "../Toy"])
    to_recbole.main([*flags, "Toy"])
    with pytest.raises(UserError, match="--overwrite replaces it"):
        to_recbole.main([*flags, "Toy"])
    with pytest.raises(UserError, match="the dataset's own folder"):
        to_recbole.main(["--data_path", str(toy), "--dataset", "Toy", "--target", str(toy)])


@pytest.mark.slow
def test_recbole_loads_the_same_split(tmp_path):
    """RecBole's loader gives our rows from the benchmark files, and the same held-out items from the atomic files."""
    try:
        python = recbole_python()
    except UserError as error:
        pytest.skip(str(error))
    toy = write_dataset(tmp_path / "data", item={**ITEMS, "6": {"title": "Nobody's", "description": ""}})
    to_recbole.main(
        ["--data_path", str(toy), "--dataset", "Toy", "--target", str(tmp_path / "r"), "--max_his_len", "4"]
    )
    probe = [python, "-c", PROBE, str(tmp_path / "r/Toy/Toy.yaml"), str(tmp_path / "found.json")]
    result = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    benchmark, own = json.loads((tmp_path / "found.json").read_text())
    for split in ("train", "valid", "test"):
        assert sorted(benchmark[split]) == sorted(expected(split, 4))
        # RecBole's sequential models hold out only one of a user with three items (here 1); its benchmark files hold out both
        own_rows, rows = ([row for row in part if row[0] != "1"] for part in (own[split], expected(split, 4)))
        assert sorted(own_rows) == sorted(rows)
    assert benchmark["loss"] > 0 and benchmark["items"] == 7
