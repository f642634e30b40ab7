"""Hub ids and pushing, against a small server that speaks the hub's protocol on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from convert_parts import delta_parts, run_script, save_model
from transformers import AutoModelForCausalLM

from convert import push
from convert.folder import find_model
from convert.hub import local_or_hub
from modeling import find_checkpoint, find_with_base, load_for_test, prepare_base
from run_folder import RunRecord
from utils import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.repos[id]` (folders) and keeps what is committed in `server.pushed[id]`."""

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, content: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.server.repos.get("/".join(parts[2:4]))
            if folder is None:
                return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            if "tree" in parts:
                sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
                return self.answer([{"type": "file", "path": n, "size": s, "oid": COMMIT} for n, s in sizes.items()])
            files = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
            return self.answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": files})
        folder = self.server.repos.get("/".join(parts[:2]))
        path = folder / parts[-1] if folder else None
        if path is None or not path.is_file():
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        data = path.read_bytes()
        self.server.downloads.append(path.name) if self.command == "GET" else None
        return self.answer(data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            return self.answer({"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                self.server.pushed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer(
            {
                "commitUrl": f"http://{self.headers['Host']}/me/x/commit/{COMMIT}",
                "commitOid": COMMIT,
                "pullRequestUrl": None,
            }
        )


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.pushed, server.downloads = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def with_hub(hub, folder: Path, *words: object, token: str = "hf_secret"):
    """Run a script that knows no other hub than `hub`."""
    url = f"http://127.0.0.1:{hub.server_address[1]}"
    settings = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # tests/run.sh keeps all other tests off the hub
    return run_script(*words, HF_ENDPOINT=url, HF_HOME=str(folder / "hf"), HF_TOKEN=token, **settings)


@pytest.mark.slow
def test_base_and_delta_from_the_hub_then_push_a_new_delta(tmp_path, hub):
    base, target = delta_parts(tmp_path)
    save_model(base, tmp_path / "base", "bin")  # beside the safetensors: must not be downloaded
    hub.repos = {"meta/tiny": tmp_path / "base", "lc/delta": tmp_path / "delta"}
    words = ["--base-model-path", "meta/tiny", "--delta-path", "lc/delta", "--target-model-path", tmp_path / "target"]
    result = with_hub(hub, tmp_path, "convert/merge_delta.py", *words)
    assert result.returncode == 0, result.stderr
    assert "model.safetensors" in hub.downloads
    assert "pytorch_model.bin" not in hub.downloads
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert (merged.state_dict()["model.norm.weight"] - target.state_dict()["model.norm.weight"]).abs().max() < 1e-3

    words = ["--base-model-path", "meta/tiny", "--target-model-path", tmp_path / "target"]
    words += ["--delta-path", tmp_path / "again", "--hub-repo-id", "me/again"]
    result = with_hub(hub, tmp_path, "convert/make_delta.py", *words)
    assert result.returncode == 0, result.stderr
    for name in ("model.safetensors", "config.json", "delta_report.json", "tokenizer.json"):
        assert hub.pushed[name] == (tmp_path / "again" / name).read_bytes()


@pytest.mark.slow
def test_the_hub_says_no(tmp_path, hub):
    delta_parts(tmp_path)
    words = ["--base-model-path", "meta/missing", "--delta-path", tmp_path / "delta"]
    result = with_hub(hub, tmp_path, "convert/merge_delta.py", *words, "--target-model-path", tmp_path / "target")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "error: meta/missing: no such folder, and the hub has no such model"
    )
    words = ["--model-path", tmp_path / "base", "--repo-id", "me/x", "--keep-card"]
    result = with_hub(hub, tmp_path, "convert/push.py", *words, token="hf_wrong")
    assert result.returncode == 2
    assert "error: me/x: the hub refused it" in result.stderr.splitlines()[-1]


def test_hub_cache_links_are_followed_but_not_further(tmp_path):
    """The cache keeps files as links into blobs/ of the same repository."""
    delta_parts(tmp_path)
    cache = tmp_path / "hub/models--lc--delta"
    snapshot = cache / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in (tmp_path / "base").iterdir():
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    found = find_model(snapshot)
    assert "model.norm.weight" in found.weights()
    (snapshot / "model.safetensors").unlink()
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(UserError, match="leads out of the folder"):
        found.weights()


# ---- folder or hub id? ----


@pytest.fixture
def reach(monkeypatch, tmp_path):
    """Make this process know one hub only (default: a port where nobody answers), and an empty cache."""
    import huggingface_hub.constants as constants

    def connect(port: int = 9) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        files = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    connect()
    return connect


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no-such-folder", "llama-7b/", "a/b/c", "models/llma"])
def test_a_mistyped_path_is_not_asked_for_at_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/llama").mkdir(parents=True)
    monkeypatch.setattr("convert.hub._ask", None)  # calling it would be a TypeError
    with pytest.raises(UserError, match=f"^{name}: no such folder \\(--base_model\\)$"):
        prepare_base(name, tmp_path / "new", [], 0)
    with pytest.raises(UserError, match=f"^{name}: no such folder$"):
        find_model(name)


def test_without_a_network_one_line_at_once(tmp_path, reach):
    start = time.monotonic()
    for load in (
        lambda: prepare_base("meta/tiny", tmp_path / "new", [], 0),
        lambda: find_checkpoint("meta/tiny"),
        lambda: find_model("meta/tiny"),
    ):
        with pytest.raises(UserError, match="^meta/tiny: no such folder.*, the hub cannot be reached .*no such model$"):
            load()
    assert time.monotonic() - start < 10  # transformers alone tries six times, for half a minute


def test_without_a_network_the_cache_serves(tmp_path, reach):
    model = delta_parts(tmp_path)[0]
    snapshot = tmp_path / "cache/models--meta--tiny/snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "base").rename(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text(COMMIT)
    prepare_base("meta/tiny", tmp_path / "new", ["<a_0>"], 0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.config.vocab_size == model.config.vocab_size + 1
    assert find_model("meta/tiny").path == snapshot


def test_the_hub_is_asked_once(tmp_path, hub, reach):
    reach(hub.server_address[1])
    hub.repos = {"meta/tiny": tmp_path}
    assert local_or_hub("meta/tiny") == "meta/tiny"
    with pytest.raises(UserError, match=r"^meta/tinny: no such folder \(--base_model\), and the hub has no such model"):
        prepare_base("meta/tinny", tmp_path / "new", [], 0)
    with pytest.raises(UserError, match="no hub id either"):
        local_or_hub("my model")


@pytest.mark.parametrize("lora", [False, True])
def test_models_and_adapters_of_the_hub_are_scored(tmp_path, hub, reach, lora):
    from test_convert_lora import IDS, save_adapter

    logits = save_adapter(tmp_path)
    reach(hub.server_address[1])
    hub.repos = {"me/base": tmp_path / "base", "me/adapter": tmp_path / "adapter"}
    if lora:
        model, _ = load_for_test(find_checkpoint("me/adapter", lora=True), str(tmp_path / "base"), lora=True)
        assert torch.allclose(model(IDS).logits, logits, atol=1e-5)
        with pytest.raises(UserError, match="is a LoRA adapter; add --lora and --base_model"):
            find_checkpoint("me/adapter")
        told = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
        for base, found in ((str(tmp_path / "base"), True), (str(tmp_path / "gone"), False)):
            told["base_model_name_or_path"] = base
            (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(told))
            folder = str(tmp_path / "adapter")
            if found:
                assert find_with_base(folder, False, "x", frozenset()) == (folder, True, base)
                assert find_with_base(folder, True, "x", frozenset({"base_model"})) == (folder, True, "x")
            else:
                with pytest.raises(UserError, match="is a LoRA adapter; add --lora and --base_model"):
                    find_with_base(folder, False, "x", frozenset())
    else:
        model, _ = load_for_test(find_checkpoint("me/base"))
        assert torch.equal(model.lm_head.weight, AutoModelForCausalLM.from_pretrained(tmp_path / "base").lm_head.weight)
        with pytest.raises(UserError, match="holds no LoRA adapter"):
            find_checkpoint("me/base", lora=True)


# ---- the model card ----


@pytest.fixture
def run(tmp_path):
    """A run's folder, its results and its index file, as finetune.py and test.py leave them."""
    folder = tmp_path / "ckpt"
    delta_parts(tmp_path)
    (tmp_path / "delta").rename(folder)
    index = tmp_path / "Games.index.json"
    index.write_text('{"0": ["<a_0>"]}')
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    files = {"index": {"path": str(index), "sha256": digest}}
    words = ["finetune.py", "--base_model", "huggyllama/llama-7b", "--no-sample_valid", "--bf16"]
    arguments = {"base_model": "huggyllama/llama-7b", "dataset": "Games"}
    RunRecord(words, arguments, 8, "hub", {}, files, {"torch": "2.13.0"}).write(folder)
    results = {
        "test_prompt_ids": "all",
        "mean_results": {"hit@10": 0.12345, "ndcg@10": 0.0681},
        "config": {
            "argv": ["test.py", "--ckpt_path", "./ckpt/my games/", "--test_prompt_ids", "all"],
            "task": "seqrec",
            "arguments": {"dataset": "Games"},
            "data_sha256": {"index": digest},
        },
    }
    (tmp_path / "result.json").write_text(json.dumps(results))
    return tmp_path


def card(folder: Path, *words: str) -> str:
    paths = ["--model-path", f"{folder}/ckpt", "--repo-id", "me/games", "--results", f"{folder}/result.json"]
    push.main([*paths, "--index-file", f"{folder}/Games.index.json", "--dry-run", *words])
    return (folder / "ckpt/README.md").read_text()


def test_card_has_dataset_hash_base_and_metrics(run):
    text = card(run)
    digest = hashlib.sha256((run / "Games.index.json").read_bytes()).hexdigest()
    assert "base_model: huggyllama/llama-7b" in text
    assert f"index: sha256 `{digest}`" in text
    assert "| seqrec | all | 0.1235 | 0.0681 |" in text
    assert "dataset Games" in text


def test_its_commands_are_the_words_that_were_typed(run):
    block = card(run).split("## Commands\n```bash\n")[1].split("```")[0]
    assert block.splitlines() == [
        "torchrun --nproc_per_node=8 finetune.py --base_model huggyllama/llama-7b --no-sample_valid --bf16",
        "python test.py --ckpt_path './ckpt/my games/' --test_prompt_ids all",
    ]


def test_without_kept_words_the_card_has_no_commands(run):
    (run / "ckpt/run.json").unlink()
    content = json.loads((run / "result.json").read_text())
    content["config"].pop("argv")
    (run / "result.json").write_text(json.dumps(content))
    assert "## Commands" not in card(run)


@pytest.mark.parametrize("text", ["[]", '{"config": []}', '{"config": {"arguments": 3}}', '{"arguments": [1]}', "{"])
@pytest.mark.parametrize("file", ["ckpt/run.json", "result.json"])
def test_records_of_another_form_are_one_line(run, file, text):
    (run / file).write_text(text)
    with pytest.raises(UserError, match=file):
        card(run)


def test_card_refuses_what_does_not_belong_together(run):
    (run / "Games.index.json").write_text("{}")
    with pytest.raises(UserError, match="is not the index file of this run"):
        card(run)


def test_a_text_of_somebody_is_kept(run):
    (run / "ckpt/README.md").write_text("mine")
    with pytest.raises(UserError, match="is there already"):
        card(run)
    assert (run / "ckpt/README.md").read_text() == "mine"
    assert "huggyllama" in card(run, "--overwrite")
    card(run)  # our own card is replaced without asking
