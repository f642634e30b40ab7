"""Raw Amazon files of both editions, written by hand."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks import bench_data
from data_process import from_amazon
from utils import UserError

META_2018 = [
    {
        "asin": "B1",
        "title": "<b>Mario</b> &amp; Luigi",
        "description": ["A <i>game</i>.", "For two."],
        "brand": "Nin\n",
        "category": ["Games", "Wii"],
    },
    {"asin": "B2", "title": "Zelda", "description": "As a text.", "brand": "", "feature": ["not needed"]},
    {"asin": "B3", "title": "Metroid", "description": [], "feature": ["Dark", "Quiet"]},
    {"asin": "B4", "title": "var aPageStart = (new Date()).getTime();", "description": [""]},
    {"asin": "B1", "title": "described twice"},
]
META_2023 = [
    {"parent_asin": "B1", "title": "Mario", "description": ["A game."], "store": "Nin", "details": {"x": 1}},
    {"parent_asin": "B2", "title": "Zelda", "description": [], "features": ["Long"], "categories": []},
    {"parent_asin": "B3", "title": "Metroid", "description": None, "price": "from 3"},
]
EVENTS = [("A", "B2", 30), ("A", "B1", 10), ("A", "B3", 20), ("A", "B4", 5), ("A", "B2", 40)]
WANTED = {"0": [0, 2, 1]}  # B1, B3, B2: B4 has no text, B2 counts once


def pack(path: Path, lines: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def reviews_2018(folder: Path) -> Path:
    lines = [
        {
            "reviewerID": u,
            "asin": i,
            "unixReviewTime": t,
            "overall": 4.0,
            "reviewText": f"at {t}<br />",
            "style": {"a": 1},
        }
        for u, i, t in EVENTS
    ]
    return pack(folder / "Video_Games_5.json.gz", lines)


def convert(tmp_path: Path, reviews: Path, metadata: Path, *flags: str) -> dict:
    common = ["--data_path", str(tmp_path / "out"), "--dataset", "D", "--user_k", "3", "--item_k", "1", *flags]
    from_amazon.main(["--reviews", str(reviews), "--metadata", str(metadata), *common])
    return {p.name[2:]: p.read_text() for p in (tmp_path / "out/D").iterdir()}


def test_reviews_and_metadata_of_2018(tmp_path, capsys):
    files = convert(tmp_path, reviews_2018(tmp_path), pack(tmp_path / "meta.json.gz", META_2018))
    assert "Amazon 2018, reviews" in capsys.readouterr().out
    assert json.loads(files["inter.json"]) == WANTED
    assert json.loads(files["item.json"]) == {
        "0": {"title": "Mario & Luigi", "description": "A game . For two.", "brand": "Nin", "categories": "Games, Wii"},
        "1": {"title": "Zelda", "description": "As a text.", "brand": "", "categories": ""},
        "2": {"title": "Metroid", "description": "Dark Quiet", "brand": "", "categories": ""},
    }
    assert json.loads(files["review.json"]) == {
        "0": [
            {"item": i, "text": f"at {t}", "rating": 4.0, "time": t, "summary": ""}
            for i, t in ((0, 10), (2, 20), (1, 30))
        ]
    }
    assert files["user2id"] == "A\t0\n" and files["item2id"] == "B1\t0\nB2\t1\nB3\t2\n"


def test_ratings_of_2018(tmp_path):
    ratings = pack(tmp_path / "Video_Games.csv", [f"{i},{u},5.0,{t}" for u, i, t in EVENTS])
    files = convert(tmp_path, ratings, pack(tmp_path / "meta.json.gz", META_2018))
    assert json.loads(files["inter.json"]) == WANTED and "review.json" not in files


def test_reviews_and_ratings_of_2023(tmp_path, capsys):
    metadata = pack(tmp_path / "meta_Video_Games.jsonl.gz", META_2023)
    lines = [
        {
            "user_id": u,
            "parent_asin": i,
            "asin": "variant",
            "timestamp": t * 1000,
            "rating": 5.0,
            "title": "T",
            "text": "x  y",
        }
        for u, i, t in EVENTS
    ]
    files = convert(tmp_path, pack(tmp_path / "Video_Games.jsonl.gz", lines), metadata)
    assert "Amazon 2023, reviews" in capsys.readouterr().out
    assert json.loads(files["inter.json"]) == WANTED
    assert json.loads(files["item.json"])["1"] == {
        "title": "Zelda",
        "description": "Long",
        "brand": "",
        "categories": "",
    }
    assert json.loads(files["item.json"])["0"]["brand"] == "Nin"
    review = {"item": 1, "text": "x y", "rating": 5.0, "time": 30_000, "summary": "T"}
    assert json.loads(files["review.json"])["0"][2] == review
    ratings = [f"{u},{i},5.0,{t * 1000}" for u, i, t in EVENTS]
    ratings = pack(tmp_path / "Video_Games.csv.gz", ["user_id,parent_asin,rating,timestamp", *ratings])
    files = convert(tmp_path, ratings, metadata, "--overwrite")
    assert json.loads(files["inter.json"]) == WANTED
    assert "review.json" not in files  # that of the run before told of other data


def test_files_are_found_by_the_dataset_name(tmp_path):
    raw = tmp_path / "raw"
    reviews_2018(raw / "Review")
    pack(raw / "Ratings/Video_Games.csv", [f"{i},{u},5.0,{t}" for u, i, t in EVENTS])
    pack(raw / "Metadata/meta_Video_Games.json.gz", META_2018)
    flags = ["--input_path", str(raw), "--output_path", str(tmp_path / "out"), "--dataset", "Games", "--gpu_id", "0"]
    from_amazon.main([*flags, "--user_k", "3", "--item_k", "1"])
    assert (tmp_path / "out/Games/Games.review.json").exists()  # texts rather than ratings alone
    pack(raw / "Metadata2/meta_Video_Games.json.gz", META_2018)
    with pytest.raises(UserError, match="has 2 files of metadata: .*; name one with --metadata"):
        from_amazon.main([*flags, "--overwrite"])
    with pytest.raises(
        UserError, match=r"has no files of reviews such as Office_Products\.json\.gz; name one with --reviews"
    ):
        from_amazon.main([*flags[:4], "--dataset", "Office"])


@pytest.mark.parametrize(
    ("reviews", "message"),
    [
        (["{}"], "neither parent_asin and user_id .* nor asin and reviewerID|neither asin and reviewerID"),
        ([""], "line 1 is empty"),
        (["a,b,c"], "line 1 has 3 fields; Amazon's ratings have item,user,rating,timestamp"),
        (["[{"], "is it Amazon's JSON, one object a line"),
    ],
)
def test_other_files_are_refused(tmp_path, reviews, message):
    with pytest.raises(UserError, match=message):
        convert(tmp_path, pack(tmp_path / "x", reviews), pack(tmp_path / "meta.json", META_2018))


def test_flags_must_name_the_files(tmp_path):
    with pytest.raises(UserError, match="name the files with --reviews and --metadata"):
        from_amazon.main(["--dataset", "Games"])
    ratings = pack(tmp_path / "r.csv", ["B1,A,5.0,1"])
    with pytest.raises(UserError, match="review files or rating files, not both"):
        from_amazon.main(["--reviews", str(ratings), str(reviews_2018(tmp_path)), "--metadata", "m", "--dataset", "D"])


def test_bad_lines_of_both_files_are_one_error(tmp_path):
    reviews = [json.dumps({"reviewerID": u, "asin": i, "unixReviewTime": t}) for u, i, t in EVENTS]
    reviews = pack(tmp_path / "r.json", [*reviews, "{cut", json.dumps({"reviewerID": "A", "asin": "B1", "overall": 5})])
    metadata = pack(tmp_path / "m.json.gz", [*META_2018, "", "{'asin': 'B9'}"])
    with pytest.raises(UserError) as error:
        convert(tmp_path, reviews, metadata)
    for part in (
        "r.json: line 6 is not JSON",
        "r.json: line 7 has no time",
        "m.json.gz: line 7 is not JSON",
        "3 bad lines",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()
    reviews.write_text(reviews.read_text().replace('"overall": 5}', '"overall": 5, "unixReviewTime": 99}'))
    assert json.loads(convert(tmp_path, reviews, metadata, "--skip_bad")["inter.json"]) == WANTED


def test_the_same_as_dicts_and_lists(tmp_path):
    """4,000 reviews with texts through a k-core: the plain implementation of the benchmark writes the same content."""
    reviews, metadata = bench_data.raw_files(tmp_path, 4_000)
    bench_data.plain(reviews, metadata, tmp_path / "plain", "D", 5)
    files = convert(tmp_path, reviews, metadata, "--user_k", "5", "--item_k", "5")
    assert len(json.loads(files["inter.json"])) > 50
    for kind in ("inter", "item", "review"):
        assert json.loads(files[f"{kind}.json"]) == json.loads((tmp_path / f"plain/D/D.{kind}.json").read_text())
