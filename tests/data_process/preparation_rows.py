"""The table of `test_preparation_abuse.py`: a row an abuse of data_process/ or convert/."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
from pathlib import Path

from abuse_check import (
    Abuse,
    both,
    copy,
    cut,
    device,
    folder,
    json_rows,
    link,
    loop,
    pipe,
    put,
    remove,
    replaced,
    weights,
    write,
)

CLICKS = "user,item,time\n" + "".join(f"u{u},i{i},{u + i}\n" for u in range(4) for i in range(4))
META = "".join(json.dumps({"asin": f"i{i}", "title": f"Thing {i}"}) + "\n" for i in range(4))
INTER, ITEM, USER = (f"Toy/Toy.{kind}.json" for kind in ("inter", "item", "user"))


def flag(command: str, *words: str, told: str = "") -> Abuse:
    return Abuse(" ".join(words)[:60], command, told or rf"{words[0]}\b", flags=words)


def socket_at(path: str):
    """A socket has the file's name."""

    def make(place: Path) -> None:
        with contextlib.chdir(place.parent), socket.socket(socket.AF_UNIX) as server:
            server.bind(place.name)  # the path of a socket must be short

    return replaced(path, make)


PLACED = {
    "a folder": folder,
    "a pipe": pipe,
    "a device": device,
    "a socket": socket_at,
    "missing": remove,
    "a loop": loop,
}
NO_FILES = ("a folder", "a device", "a link to itself")  # convert/ says it in words of its own
NUMBERS = ("nan", "-1", "inf", "9" * 30, "x", "²")


FLAGS = [
    *(
        flag(command, f"--{name}", value)
        for command, names in {
            "table": "k_core user_k item_k min_rating st_year st_month ed_year ed_month",
            "embed": "batch_size max_sent_len part_size",
            "behaviour": "width window weight",
            "texts": "seed concurrency retries timeout tries max_tokens temperature batch_size price_in price_out",
            "base": "vocab_size hidden_size layers heads seed",
            "merge": "max-shard-size",
            "to recbole": "max_his_len",
            "check": "show",
        }.items()
        for name in names.split()
        for value in NUMBERS
        if (name, value) not in (("min_rating", "-1"), ("max_his_len", "-1"), ("max-shard-size", "9" * 30))
    ),
    *(
        flag(command, "--dataset", value)
        for command in ("embed", "behaviour", "texts", "base", "to recbole", "add", "table", "amazon", "check")
        for value in ("../Toy", "..", "/etc", "a/b", "Toy\0")
    ),
    *(flag("add", "--new_dataset", value) for value in ("../x", ".", "Toy", "")),
    *(flag("embed", "--plm_name", value) for value in ("../x", "a/b", "..", "")),
    *(
        flag("embed", "--fields", value)
        for value in ("", "title,title", "/x", "title:nan", "title:-1", "title:1e999", "\0")
    ),
    *(flag("embed", "--device", value) for value in ("abacus", "meta", "cuda:-1", "")),
    *(flag("embed", "--output_file", value) for value in ("{w}/Toy/Toy.item.json", "{w}/Toy", "", "/")),
    flag("embed", "--output_file", "{w}/Toy/Toy.item.json", "--overwrite"),
    flag("behaviour", "--output_file", "{w}/Toy/Toy.inter.json", "--overwrite"),
    flag("behaviour", "--output_file", "{w}/e.npy", "--overwrite", told="e.npy: is read, and would be overwritten"),
    flag("behaviour", "--output_file", "{w}/Toy/../e.npy", "--overwrite", told="e.npy: is read, and would be"),
    *(
        flag(command, "--data_path", "\udcff", told="not valid UTF-8")
        for command in ("table", "embed", "texts", "base")
    ),
    *(
        flag("merge", "--delta-path", value, told="delta|no such|^error: /: |is empty")
        for value in ("", "/", "nowhere", "a\0b", "\udcff")
    ),
    flag("merge", "--max-shard-size", "0"),
    flag("merge", "--dtype", "float8"),
    flag("merge", "--no-such-flag"),
    flag("scan", "{w}/nowhere", told="no such folder"),
    flag("merge", "--target-model-path", "{w}/base", "--overwrite", told="is what is read from"),
    flag("merge", "--target-model-path", "{w}/delta", "--overwrite", told="is what is read from"),
    flag("merge", "--target-model-path", "{w}/Toy", "--overwrite", told="was not written here"),
    flag("base", "--target", "{w}/Toy", told="not empty"),
    flag("base", "--target", "{w}/e.npy", told="a file is in the way"),
    flag("base", "--hidden_size", "7"),
    flag("texts", "--settings", "[" * 100_000, "--base_url", "http://127.0.0.1:9/v1", "--model", "m"),
    flag("texts", "--base_url", "file:///etc/passwd", "--model", "m"),
    flag("texts", "--base_url", "http://[", "--model", "m"),
    flag("texts", "--base_url", "http://127.0.0.1:99999", "--model", "m"),
    flag("to recbole", "--target", "{w}", told="own folder"),
    *(flag("table", "--items", value, told="no such file") for value in ("", "**x", "a**", "nowhere*", "{w}/nowhere")),
    flag("push", "--index-file", "{w}/Toy", told="Toy"),
    flag("push", "--results", "{w}/nowhere.json", told="no such file"),
]


WEIGHTS = ("model/model.safetensors", "base/model.safetensors")
ELSEWHERE = {(path, kind) for path in WEIGHTS for kind in ("missing", "a loop")} | {("base/config.json", "missing")}
ELSEWHERE |= {("base/config.json", "a pipe")}  # these are rows above, or said of the folder


def _rated(w: Path) -> None:
    rating = 10**400
    inters = json.loads((w / INTER).read_text())
    rows = {user: [{"item": item, "text": "", "rating": rating} for item in items] for user, items in inters.items()}
    (w / "Toy/Toy.review.json").write_text(json.dumps(rows))


def _spoil_sum(w: Path) -> None:
    packed = w / "r.json.gz"
    packed.write_bytes(packed.read_bytes()[:-8] + b"\0" * 8)


def _provenance(command: str, path: str) -> Abuse:
    return Abuse("a record of provenance that is none", command, "provenance.json", write(path, [1]))


def _raw(command: str, path: str, name: str, told: str, content: bytes | str) -> Abuse:
    return Abuse(f"{path} {name}", command, told, write(path, content))


FILES = [
    *json_rows("embed", ITEM),
    *json_rows("texts", INTER),
    *json_rows("base", USER, "missing"),
    *json_rows("add", ITEM),
    *json_rows("to recbole", ITEM),
    *json_rows("push", "r.json"),
    *json_rows("merge", "delta/config.json", "missing", *NO_FILES, told="delta"),
    *json_rows("merge", "base/config.json", *NO_FILES, told="base"),
    *json_rows("embed", "model/config.json", told="model"),
    *json_rows("embed", "model/tokenizer.json", "missing", told="model"),
    *json_rows(
        "texts",
        "Toy/Toy.review.json",
        "missing",
        flags=("--base_url", "http://127.0.0.1:9/v1", "--model", "m", "--retries", "0"),
    ),
    *(
        Abuse(f"{path} is {kind}", command, Path(path).name.replace(".", r"\."), broken(path))
        for command, path in (
            ("table", "clicks.csv"),
            ("table", "products.csv"),
            ("amazon", "r.json.gz"),
            ("recbole", "ml/ml.inter"),
            ("add", "Toy/Toy.item2id"),
            ("behaviour", "e.npy"),
            ("embed", "model/model.safetensors"),
            ("merge", "base/model.safetensors"),
            ("merge", "base/config.json"),
        )
        for kind, broken in PLACED.items()
        if (path, kind) not in ELSEWHERE
    ),
    *(
        _provenance(command, path)
        for command, path in (
            ("table", "Mine/Mine.provenance.json"),
            ("add", "Toy2/Toy2.provenance.json"),
            ("embed", "Toy.provenance.json"),
            ("behaviour", "Toy/Toy.provenance.json"),
            ("texts", "Toy/Toy.provenance.json"),
        )
    ),
    *(
        _raw("table", "clicks.csv", name, told, content)
        for name, told, content in (
            ("is empty", "clicks.csv", b""),
            ("is a head alone", "clicks.csv: no interaction", "user,item,time\n"),
            ("is UTF-16", "clicks.csv", CLICKS.encode("utf-16")),
            ("is not UTF-8", "line 2 is not UTF-8", b"user,item,time\n\xff,i1,1\n"),
            ("has NUL", "clicks.csv: line 2", "user,item,time\na\0b,i1,1\n"),
            ("has a time that is NaN", "line 2 has no time", "user,item,time\nu1,i1,nan\n"),
            ("has a time that is 1e999", "line 2 has no time", "user,item,time\nu1,i1,1e999\n"),
            ("has a field twice", "field 'user' twice", "user,item,time,user\na,b,1,c\n"),
            ("has a quote that stays open", "clicks.csv", 'user,item,time\n"a,i1,1\n'),
            ("has old Macs' line ends", "clicks.csv", CLICKS.replace("\n", "\r")),
        )
    ),
    Abuse(
        "clicks.csv has a byte-order mark and CRLF",
        "table",
        None,
        lambda w: (w / "clicks.csv").write_bytes(b"\xef\xbb\xbf" + CLICKS.replace("\n", "\r\n").encode()),
    ),
    Abuse(
        "a table that is Parquet by name",
        "table",
        "x.parquet: cannot be read",
        write("x.parquet", b"PAR1" + b"\0" * 50),
        ("--items", "{w}/x.parquet"),
    ),
    Abuse("a table that is empty Parquet", "table", "x.parquet", write("x.parquet", b""), ("--items", "{w}/x.parquet")),
    Abuse(
        "an output that is an input",
        "table",
        "is read, and would be overwritten",
        both(copy("clicks.csv", "Mine/Mine.item.json")),
        ("--interactions", "{w}/Mine/Mine.item.json", "--overwrite"),
    ),
    Abuse("reviews that are cut", "amazon", "r.json.gz: cannot be unpacked", cut("r.json.gz")),
    Abuse("reviews with a broken sum", "amazon", "r.json.gz: cannot be unpacked", _spoil_sum),
    Abuse(
        "reviews that are a bomb",
        "amazon",
        "longer than 64 MB",
        lambda w: (w / "r.json.gz").write_bytes(gzip.compress(b'{"reviewerID": "' + b"\0" * (80 << 20), 1)),
    ),
    _raw("amazon", "m.json", "is nested 200,000 deep", "m.json", b"[" * 200_000),
    _raw(
        "amazon",
        "m.json",
        "has a number of 5,000 digits",
        "m.json",
        META.encode() + b'{"asin": "x", "title": ' + b"9" * 5000 + b"}\n",
    ),
    _raw("recbole", "ml/ml.inter", "without kinds", "line 1 must name the fields", "user_id\titem_id\ttimestamp\n"),
    _raw("recbole", "ml/ml.inter", "that is empty", "line 1 must name the fields", b""),
    _raw("add", "Toy/Toy.item2id", "has gaps", "must number the 6 items", "a\t0\nb\t2\n"),
    _raw("add", "Toy/Toy.item2id", "is not UTF-8", "cannot be read", b"\xff\t0\n"),
    Abuse(
        "new items and a pipe beside the old ones", "add", "Toy.user2id: is not a regular file", pipe("Toy/Toy.user2id")
    ),
    Abuse("new items where user texts are", "add", "Toy2.user.json is there already", write("Toy2/Toy2.user.json", {})),
    *(
        Abuse(
            f"results with {key} 5",
            "check",
            "must be an object",
            put("r.json", *keys, value=5),
            ("--verify", "--results_file", "{w}/r.json"),
        )
        for key, keys in (("hashes", ("config", "data_sha256")), ("a checkpoint", ("config", "arguments", "ckpt_path")))
    ),
    Abuse(
        "a broken record",
        "check",
        "provenance.json: broken JSON",
        write("Toy/Toy.provenance.json", b"["),
        ("--verify",),
    ),
    Abuse("no dataset", "to recbole", "no such file", both(remove("Toy"), write("out/Toy/x", b""))),
    Abuse("categories that are numbers", "to recbole", None, put(ITEM, "1", "categories", value=[1, None])),
    Abuse("categories that are numbers", "texts", None, put(ITEM, "1", "categories", value=[1, None])),
    Abuse("a description that is a number", "embed", "description", put(ITEM, "1", "description", value=3)),
    Abuse(
        "a layer of the encoder is missing",
        "embed",
        "lack",
        weights("model/model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
    ),
    Abuse("the encoder is cut", "embed", "model", cut("model/model.safetensors")),
    Abuse(
        "an encoder with NaN",
        "embed",
        "is not finite",
        weights("model/model.safetensors", lambda t: [x.fill_(float("nan")) for x in t.values()]),
    ),
    Abuse(
        "a chat template that stops",
        "local texts",
        "chat template",
        put("model/tokenizer_config.json", "chat_template", value="{{ 1 // 0 }}"),
    ),
    Abuse(
        "a chat template that looks for Python",
        "local texts",
        "chat template",
        put(
            "model/tokenizer_config.json", "chat_template", value="{{ ''.__class__.__mro__[1].__subclasses__()[0]() }}"
        ),
    ),
    Abuse(
        "a chat template that is none",
        "local texts",
        "chat template|tokenizer",
        put("model/tokenizer_config.json", "chat_template", value="{% for"),
    ),
    Abuse(
        "an answer that is a number",
        "local texts",
        None,
        write("Toy/Toy.user.answers.jsonl", b'{"key": [1], "answer": 5}\n{"key": "a", "answer": 5}\nnull\n'),
    ),
    Abuse(
        "answers in a pipe", "local texts", "answers.jsonl: is not a regular file", pipe("Toy/Toy.user.answers.jsonl")
    ),
    Abuse(
        "a rating of 10^400",
        "texts",
        "'rating' of review 0",
        _rated,
        ("--base_url", "http://127.0.0.1:9/v1", "--model", "m", "--retries", "0"),
    ),
    Abuse(
        "results of 10^400", "push", "r.json: not a results file", put("r.json", "mean_results", "hit@1", value=10**400)
    ),
    Abuse(
        "results that are NaN",
        "push",
        "r.json: not a results file",
        put("r.json", "mean_results", "hit@1", value=float("nan")),
    ),
    Abuse("a card that is not UTF-8", "push", "README.md: is there already", write("base/README.md", b"\xff")),
    Abuse(
        "an index of weights that leaves the folder",
        "merge",
        "leaves the folder",
        both(
            copy("base/model.safetensors", "x.safetensors"),
            remove("base/model.safetensors"),
            write("base/model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}),
        ),
    ),
    Abuse(
        "weights behind a link",
        "merge",
        "link that leads out",
        both(
            copy("base/model.safetensors", "x.safetensors"),
            remove("base/model.safetensors"),
            link("base/model.safetensors", "x.safetensors"),
        ),
    ),
    Abuse(
        "a record of files that leads out by a link",
        "merge",
        "holds link, which was not written here",
        both(
            write("merged/.written.json", {"files": ["config.json", "link/Toy.item.json"]}),
            write("merged/config.json", {}),
            link("merged/link", "Toy"),
        ),
        ("--overwrite",),
    ),
    *(
        Abuse(
            f"a record of files that lists {name!r}",
            "merge",
            "written.json",
            both(write("merged/.written.json", {"files": [name]}), write("merged/x", b"")),
            ("--overwrite",),
        )
        for name in ("../e.npy", "/etc/passwd", "", ".", 3)
    ),
]
