"""Put a trained model, an adapter or a delta on the Hugging Face hub, with a model card made from the files of its run.

    python convert/push.py --model-path ckpt/Games --repo-id you/lcrec-games --results results/Games/result.json \\
        --index-file data/Games/Games.index.json
    … --dry-run      # only write the card, MODEL_PATH/README.md

The card has the dataset with the hashes of its files, the base, the metrics and the exact commands. Log in first, with
`hf auth login`. Only weights, settings, tokenizer, reports and the card are uploaded, never the state of the optimizer.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from convert.folder import RUN_FILES, SETTINGS, TOKENIZER_FILES
from convert.hub import reason
from folders import LOADERS
from quiet import silence_libraries
from results import read_results
from run_folder import RunFolder, RunRecord
from utils import UserError, atomic_path, run_main, say, sha256

CARD_MARK = "<!-- written by convert/push.py; edit freely and remove this line to keep your text -->"
REPORTS = ("merge_report.json", "delta_report.json", "convert_report.json")
UPLOADED = (
    *LOADERS,
    *SETTINGS,
    *TOKENIZER_FILES,
    *REPORTS,
    *RUN_FILES,
    "model*.safetensors*",
    "adapter_model.safetensors",
    "pytorch_model*.bin*",
    "README.md",
)


def command_line(words: Any, processes: Any) -> list[str]:
    """The command that a run or a test kept as `argv`; none if it kept no words."""
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        return []
    many = isinstance(processes, int) and processes > 1
    start = f"torchrun --nproc_per_node={processes}" if many else "python"
    return [f"{start} {shlex.join([Path(words[0]).name, *words[1:]])}"]


def metrics_table(results: list[tuple[Path, dict[str, Any]]]) -> list[str]:
    """A Markdown table of the mean over prompts, one line for each results file."""
    lines = []
    for path, content in results:
        means = content.get("mean_results")
        if not isinstance(means, dict) or not all(
            type(value) in (int, float) and abs(value) < 1e9 for value in means.values()
        ):
            raise UserError(f"{path}: not a results file of test.py (mean_results is missing)")
        if not lines:
            lines += ["| task | prompts | " + " | ".join(means) + " |", "| --- | --- |" + " --- |" * len(means)]
        task = content["config"].get("task", "seqrec")
        cells = [str(task), str(content.get("test_prompt_ids", "")), *(f"{value:.4f}" for value in means.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def kind_of(folder: Path) -> str:
    """`delta`, `adapter` or `model`.

    Raises:
        UserError: nothing of these.
    """
    if (folder / "delta_report.json").is_file():
        return "delta"
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return "adapter"
    if (folder / "config.json").is_file():
        return "model"
    raise UserError(f"{folder}: holds no model, adapter or delta (no config.json)")


USAGE = {
    "model": "python test.py --ckpt_path {repo} --dataset {dataset} --data_path ./data --test_prompt_ids all",
    "adapter": "python test.py --lora --base_model {base} --ckpt_path {repo} --dataset {dataset} --data_path ./data",
    "delta": (
        "python convert/merge_delta.py --base-model-path {base} --target-model-path ckpt/{dataset} --delta-path {repo}"
    ),
}


def make_card(folder: Path, repo_id: str, results: list[Path], index_file: Path | None) -> str:
    """The text of the model card.

    Raises:
        UserError: a file it is made from is missing or of another form.
    """
    run = RunFolder(folder).record()
    tested = [(path, read_results(path)) for path in results]
    trained = run.arguments if run else {}
    dataset = trained.get("dataset") or next((c["config"]["arguments"].get("dataset") for _, c in tested), None)
    if not isinstance(dataset, str):
        raise UserError(f"{folder}: has no run.json of finetune.py, so give --results at least")
    base = str(trained.get("base_model", "its base"))
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}"] if _is_hub_id(base) else []
    front += ["tags: [recommendation, lc-rec]", "---"]
    kind = kind_of(folder)
    usage = USAGE[kind].format(repo=repo_id, dataset=dataset, base=base)
    text = [
        *front,
        CARD_MARK,
        f"# {repo_id.split('/')[-1]}",
        f"A generative recommender in the manner of LC-Rec (arXiv 2311.09049): {_article(kind)} for the dataset {dataset}.",
        "",
        f"- Base: {base}",
        *_data_lines(run, tested, index_file),
        "",
        "## Use",
        f"```bash\n{usage}\n```",
    ]
    if tested:
        text += ["## Results", *metrics_table(tested)]
    commands = command_line(run.argv, run.processes) if run else []
    for _, content in tested:
        commands += command_line(content["config"].get("argv"), content["config"].get("processes"))
    if commands:
        text += ["", "## Commands", "```bash", *commands, "```"]
    if run:
        text += ["", "Versions: " + ", ".join(f"{name} {version}" for name, version in run.versions.items()) + "."]
    return "\n".join(text) + "\n"


def _article(kind: str) -> str:
    return {"model": "a model", "adapter": "a LoRA adapter", "delta": "a delta against its base"}[kind]


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _data_lines(run: RunRecord | None, tested: list[tuple[Path, dict[str, Any]]], index_file: Path | None) -> list[str]:
    """The data files with their hashes; the index file given must be the one that was trained on.

    Raises:
        UserError: the index file is another one.
    """
    hashes = {name: entry["sha256"] for name, entry in run.files.items()} if run else {}
    for path, content in tested:
        measured = content["config"].get("data_sha256", {})
        if not isinstance(measured, dict):
            raise UserError(f"{path}: data_sha256 is not an object")
        for name, digest in measured.items():
            if hashes.setdefault(name, digest) != digest:
                raise UserError(f"{path}: was measured on another {name} file than the model was trained on")
    if index_file is not None:
        if not index_file.is_file():
            raise UserError(f"{index_file}: no such file")
        if hashes.setdefault("index", sha256(index_file)) != sha256(index_file):
            raise UserError(f"{index_file}: is not the index file of this run (its hash differs)")
    return [f"- {name}: sha256 `{digest}`" for name, digest in sorted(hashes.items())]


def write_card(folder: Path, text: str, overwrite: bool) -> None:
    """Write `README.md`; a text of somebody's own is kept unless `overwrite`."""
    path = folder / "README.md"
    if path.is_file() and CARD_MARK.encode() not in path.read_bytes() and not overwrite:
        raise UserError(f"{path}: is there already; add --overwrite to replace it, or --keep-card to push it as it is")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def push_folder(folder: Path, repo_id: str, private: bool = False, index_file: Path | None = None) -> str:
    """Upload a folder's model files to the hub, in one commit each for the model and its index file; the page's address.

    Raises:
        UserError: the hub refused it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), allow_patterns=list(UPLOADED))
        if index_file is not None:
            api.upload_file(repo_id=repo_id, path_or_fileobj=str(index_file), path_in_repo=index_file.name)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(
            f"{repo_id}: the hub refused it ({reason(error)}); did you log in with hf auth login?"
        ) from None
    return str(url)


def main(argv: list[str] | None = None) -> None:
    """Write the card and push."""
    parser = make_parser(__doc__)
    parser.add_argument("--model-path", required=True, type=Path, help="folder of the model, adapter or delta")
    parser.add_argument("--repo-id", required=True, help="hub repository, owner/name; made if missing")
    parser.add_argument("--results", nargs="*", default=[], type=Path, help="results files of test.py")
    parser.add_argument("--index-file", type=Path, help="the dataset's index file, uploaded too")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--dry-run", action="store_true", help="write the card, push nothing")
    parser.add_argument("--keep-card", action="store_true", help="push the README.md that is there")
    parser.add_argument("--overwrite", action="store_true", help="replace a README.md of somebody's own")
    args = parser.parse_args(argv)
    silence_libraries()
    if not args.model_path.is_dir():
        raise UserError(f"{args.model_path}: no such folder")
    kind_of(args.model_path)
    if not args.keep_card:
        text = make_card(args.model_path, args.repo_id, args.results, args.index_file)
        write_card(args.model_path, text, args.overwrite)
        say(f"{args.model_path / 'README.md'}: the model card, {len(text.splitlines())} lines")
    if not args.dry_run:
        say(push_folder(args.model_path, args.repo_id, args.private, args.index_file))


if __name__ == "__main__":
    run_main(main)
