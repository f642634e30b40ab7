"""The third part of the table of `test_abuse.py`: results, predictions, requests."""

from __future__ import annotations

import json

from abuse_check import Abuse, cut, device, drop, folder, json_rows, loop, pipe, put, remove, write

RESULTS, PREDICTIONS = "results/r.json", "results/r.predictions.jsonl"


def _line(**changes: object) -> bytes:
    record = {
        "prompt_id": 0,
        "sample": 0,
        "user": "0",
        "target": 1,
        "target_item": 1,
        "items": [1, 2],
        "scores": [0, 0],
    }
    return (json.dumps(record | changes) + "\n").encode()


LINES = {
    "a list": (b"[]\n", "not an object"),
    "nothing": (b"\n", "broken JSON"),
    "nested 200,000 deep": (b"[" * 200_000, "nested too deep"),
    "a number of 5,000 digits": (b'{"prompt_id": ' + b"9" * 5000 + b"}", "thousands of digits"),
    "not UTF-8": (b"\xff\n", "not UTF-8"),
    "cut": (_line()[:30], "broken JSON"),
    "without target": (b'{"prompt_id": 0, "sample": 0, "items": []}', "target is not an integer"),
    "a sample that is true": (_line(sample=True), "sample is not an integer"),
    "items in a text": (_line(items="1 2"), "items is not a list"),
    "items that are texts": (_line(items=["1"]), "items is not a list"),
    "an item twice": (_line(items=[1, 1]), "twice"),
    "half a character": (_line().replace(b'"0"', rb'"\ud800"'), "not valid Unicode"),
    "the same line twice": (_line() * 2, "occurs twice"),
    "empty": (b"", "no predictions"),
}
RESULT = [
    *(
        Abuse(
            f"predictions: {kind}",
            "evaluate",
            rf"r\.predictions\.jsonl.*{told}|{told}.*predictions",
            write(PREDICTIONS, content),
        )
        for kind, (content, told) in LINES.items()
    ),
    *(
        Abuse(f"predictions are {kind}", command, rf"r\.predictions\.jsonl.*{told}", broken(PREDICTIONS))
        for command in ("evaluate", "report")
        for kind, broken, told in (
            ("missing", remove, "no such file"),
            ("a folder", folder, "is a folder"),
            ("a pipe", pipe, "not a regular file"),
            ("a device", device, "not a regular file"),
            ("a loop", loop, "cannot be read"),
        )
    ),
    *json_rows("report", RESULTS),
    *json_rows("test again", RESULTS, "missing"),
    Abuse("a broken model and --restart", "test again", "run/model", cut("run/model.safetensors"), ("--restart",)),
    Abuse("results without predictions", "test again", "exists; name another", remove(PREDICTIONS)),
    Abuse("predictions without results", "test again", "exists; name another", remove(RESULTS)),
    Abuse(
        "results of another task",
        "report",
        "of the task itemsearch",
        put(RESULTS, "config", "task", value="itemsearch"),
    ),
    Abuse("results of a task that is a list", "report", r"r\.json", put(RESULTS, "config", "task", value=["seqrec"])),
    Abuse(
        "results of other data",
        "report",
        "made with another",
        put(RESULTS, "config", "data_sha256", "inter", value="0"),
    ),
    Abuse(
        "results with another number of beams",
        "test again",
        "another num_beams",
        put(RESULTS, "config", "arguments", "num_beams", value=3),
    ),
    Abuse("results without arguments", "test again", "not a results file", put(RESULTS, "config", value={})),
    Abuse("results without task", "test again", "no result of this script", drop(RESULTS, "config", "task")),
    Abuse(
        "results with hashes in a list",
        "test again",
        "no result of this script",
        put(RESULTS, "config", "data_sha256", value=[]),
    ),
    Abuse("a user that is unknown", "report", "is not in toy", write(PREDICTIONS, _line(user="x"))),
    Abuse("an item that is unknown", "report", "is not in toy", write(PREDICTIONS, _line(items=[99]))),
    Abuse("another target", "report", "the target is", write(PREDICTIONS, _line(target=29, items=[1]))),
    Abuse("a prompt of 10^30", "report", "", write(PREDICTIONS, _line(prompt_id=10**30, user="x"))),
    Abuse(
        "results named twice",
        "report",
        "names a file twice",
        flags=("--results_file", "{w}/results/r.json", "{w}/results/../results/r.json"),
    ),
    Abuse("requests that are missing", "requests", r"requests\.jsonl: no such file", remove("requests.jsonl")),
    Abuse("requests in a pipe", "requests", r"requests\.jsonl: is not a regular", pipe("requests.jsonl")),
    Abuse("requests in a device", "requests", r"requests\.jsonl: is not a regular", device("requests.jsonl")),
    Abuse("requests in a folder", "requests", r"requests\.jsonl: is a folder", folder("requests.jsonl")),
    Abuse("requests in a loop", "requests", r"requests\.jsonl: cannot be read", loop("requests.jsonl")),
]
