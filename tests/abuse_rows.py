"""The table of `test_abuse.py`: a row an abuse. First the files of a dataset, the prompts and the flags."""

from __future__ import annotations

from abuse_check import Abuse, both, copy, edit, folder, json_rows, link, loop, pipe, put, remove, rename, write

INTER, ITEM, INDEX, USER = (f"toy/toy.{kind}.json" for kind in ("inter", "item", "index", "user"))
PROMPTS = ("--prompt_file", "{w}/prompts.json")
PREFERENCES, WISHES = "user_explicit_preference", "user_vague_intention"


def _bom(path: str) -> Abuse:
    return Abuse(f"{path} has a byte-order mark and CRLF", "test", None, edit(path, lambda content: None, bom=True))


DATA = [
    *json_rows("finetune", INTER),
    *json_rows("test", ITEM),
    *json_rows("test", INDEX),
    *json_rows("finetune", USER),
    *map(_bom, (INTER, ITEM, INDEX)),
    Abuse("an index key 01", "test", r"index\.json: item '1' has no index", rename(INDEX, "1", "01")),
    Abuse("an index key ²", "test", r"index\.json: item '2' has no index", rename(INDEX, "2", "²")),
    Abuse("an index key more", "test", r"index\.json: has item '٣'", put(INDEX, "٣", value=["<a_1>"])),
    Abuse("an index that is a text", "test", r"index\.json: item '3' must have a list", put(INDEX, "3", value="<a_1>")),
    Abuse("an index without tokens", "test", r"index\.json: item '3' must have a list", put(INDEX, "3", value=[])),
    Abuse("a token that is a number", "test", r"index\.json: item '3' has '7'", put(INDEX, "3", value=[7])),
    Abuse("a token with a line feed", "test", r"index\.json: item '3' has '<a_1>", put(INDEX, "3", value=["<a_1>\n"])),
    Abuse("a token with other digits", "test", r"index\.json: item '3' has '<a_.>'", put(INDEX, "3", value=["<a_١>"])),
    Abuse("a token of the tokenizer", "test", r"index\.json: item '3' has '</s>'", put(INDEX, "3", value=["</s>"])),
    Abuse("a token very long", "test", r"index\.json: item '3'", put(INDEX, "3", value=["x" * 10**6])),
    Abuse("an item key 01", "test", r"item\.json: has no item '1'", rename(ITEM, "1", "01")),
    Abuse(
        "a title that is a number",
        "test",
        r"item\.json: item '2' has no text in 'title'",
        put(ITEM, "2", "title", value=2),
    ),
    Abuse("an item without texts", "test", r"item\.json: item '2' has neither", put(ITEM, "2", value={"title": " "})),
    Abuse("an item that is null", "test", r"item\.json: has no item '2'", put(ITEM, "2", value=None)),
    Abuse("a title with half a character", "test", "not valid Unicode", put(ITEM, "2", "title", value="a\ud800")),
    Abuse("a user with two items", "test", r"inter\.json: user '1' has 2 inter", put(INTER, "1", value=[1, 2])),
    Abuse(
        "an item that is a text", "test", r"inter\.json: user '1': '2' is not an item", put(INTER, "1", 0, value="2")
    ),
    Abuse("an item that is true", "test", r"inter\.json: user '1': True is not", put(INTER, "1", 0, value=True)),
    Abuse("an item that is 1.0", "test", r"inter\.json: user '1': 1.0 is not", put(INTER, "1", 0, value=1.0)),
    Abuse("an item that is -1", "test", r"inter\.json: user '1': -1 is not", put(INTER, "1", 0, value=-1)),
    Abuse("an item that is 30", "test", r"inter\.json: user '1': 30 is not", put(INTER, "1", 0, value=30)),
    Abuse("an item that is 10^400", "test", r"inter\.json: user '1': 1000", put(INTER, "1", 0, value=10**400)),
    Abuse("a user that is an object", "test", r"inter\.json: user '1' must be a list", put(INTER, "1", value={})),
    Abuse("a user with half a character", "test", "not valid Unicode", rename(INTER, "1", "\udfff")),
    Abuse("a preference of nobody", "finetune", "'x' is not a user", rename(USER, PREFERENCES, "1", "x")),
    Abuse("a preference that is a text", "finetune", "'1' must be a list", put(USER, PREFERENCES, "1", value="x")),
    Abuse("one query", "finetune", "'querys' must be two", put(USER, WISHES, "train", "1", "querys", value=["x"])),
    Abuse("a wish for no item", "finetune", "'item': 99 is not", put(USER, WISHES, "train", "1", "item", value=99)),
    Abuse("a wish without history", "finetune", "'inters' must be", put(USER, WISHES, "train", "1", "inters", value=3)),
    Abuse("wishes that are a list", "finetune", f"'{WISHES}' must be an object", put(USER, WISHES, value=[1])),
    Abuse("no folder of the dataset", "test", "toy: no such folder", remove("toy")),
    Abuse("a file for the dataset's folder", "test", "toy: no such folder", both(remove("toy"), write("toy", b"x"))),
    Abuse("a loop for the dataset's folder", "test", "toy: no such folder", loop("toy")),
    Abuse("a dataset without name", "test", "--dataset", flags=("--dataset", "")),
    Abuse("an index file for the ending", "test", "no such file", flags=("--index_file", "toy/toy.index.json")),
]


def _template(task: str, instruction: object, response: object) -> dict:
    frame = "{instruction} {response}"
    return {"sft_prompt": frame, "all_prompt": {task: [{"instruction": instruction, "response": response}]}}


ASKING = [
    *json_rows("finetune", "prompts.json", flags=PROMPTS),
    *(
        Abuse(name, "finetune", told, write("prompts.json", content), PROMPTS)
        for name, told, content in (
            (
                "a frame without response",
                r"prompts\.json: sft_prompt",
                {"sft_prompt": "{instruction}", "all_prompt": {}},
            ),
            ("a frame that is null", r"prompts\.json: sft_prompt", {"sft_prompt": None, "all_prompt": {}}),
            (
                "templates in a list",
                r"prompts\.json: all_prompt",
                {"sft_prompt": "{instruction}{response}", "all_prompt": []},
            ),
            ("a task that is unknown", "unknown task 'x'", _template("x", "{inters}", "{item}")),
            ("a template without text", r"\['seqrec'\]\[0\] must have", _template("seqrec", 1, "{item}")),
            ("the target in the instruction", "would betray", _template("seqrec", "{inters} {item}", "{item}")),
            ("a slot that is unknown", "{x} in the instruction is unknown", _template("seqrec", "{x}", "{item}")),
            (
                "no templates for seqrec",
                "no templates for the task seqrec",
                _template("item2index", "{title}", "{item}"),
            ),
        )
    ),
    Abuse(
        "a prompt file that stops",
        "finetune",
        "stopped with ZeroDivisionError",
        write("p.py", "1 / 0\n"),
        ("--prompt_file", "{w}/p.py"),
    ),
    Abuse(
        "a prompt file that exits",
        "finetune",
        "stopped with SystemExit",
        write("p.py", "raise SystemExit(0)\n"),
        ("--prompt_file", "{w}/p.py"),
    ),
    Abuse(
        "a prompt file with NUL",
        "finetune",
        "p.py: stopped with",
        write("p.py", b"x = 1\0\n"),
        ("--prompt_file", "{w}/p.py"),
    ),
    Abuse("a prompt file in a pipe", "finetune", "not a regular", pipe("p.py"), ("--prompt_file", "{w}/p.py")),
    Abuse("half a character on the command line", "finetune", "not valid UTF-8", flags=("--his_sep", "\udcff")),
    *json_rows("test", "run/prompt_style.json", "missing"),
    *(
        Abuse(
            f"{key} of the style is {value!r}",
            "test",
            rf"prompt_style\.json: '{key}'",
            put("run/prompt_style.json", key, value=value),
        )
        for key, value in (
            ("max_his_len", "20"),
            ("max_his_len", -7),
            ("add_prefix", 1),
            ("his_sep", None),
            ("no_eos", "false"),
            ("dataset", 3),
        )
    ),
    Abuse(
        "a style without templates",
        "test",
        r"prompt_style\.json: all_prompt",
        put("run/prompt_style.json", "all_prompt", value=3),
    ),
    Abuse(
        "a style that betrays",
        "test",
        r"prompt_style\.json.*would betray",
        put("run/prompt_style.json", "all_prompt", "seqrec", 0, "instruction", value="{item}"),
    ),
    *json_rows("test", "run/item_index.json", "missing"),
    Abuse(
        "a list of items without titles",
        "recommend",
        r"item_index\.json: item '1' must",
        put("run/item_index.json", "1", "title", value=1),
    ),
    Abuse(
        "a list of items with gaps",
        "recommend",
        r"item_index\.json: item '1' must",
        rename("run/item_index.json", "1", "01"),
    ),
    Abuse(
        "a list of items with other tokens",
        "recommend",
        r"item_index\.json: item '1' has 'x'",
        put("run/item_index.json", "1", "index", value=["x"]),
    ),
    Abuse(
        "the index of an item changed",
        "test",
        r"index\.json: item 4 is <a_0>, but .*item_index\.json",
        put(INDEX, "4", value=["<a_0>"]),
    ),
]


def _flag(command: str, *words: str, told: str = "") -> Abuse:
    return Abuse(" ".join(words) or "no flags", command, told or rf"{words[0]}\b", flags=words)


FLAGS = [
    _flag("finetune", "--seed", "-1"),
    _flag("finetune", "--seed", str(2**64)),
    _flag("finetune", "--seed", "9" * 5000),
    _flag("finetune", "--epochs", "nan"),
    _flag("finetune", "--epochs", "0"),
    _flag("finetune", "--epochs", "inf"),
    _flag("finetune", "--epochs", "1e400"),
    _flag("finetune", "--learning_rate", "nan"),
    _flag("finetune", "--learning_rate", "-1"),
    _flag("finetune", "--warmup_ratio", "-1"),
    _flag("finetune", "--warmup_ratio", "2"),
    _flag("finetune", "--model_max_length", "0"),
    _flag("finetune", "--model_max_length", "-5"),
    _flag("finetune", "--weight_decay", "-3"),
    _flag("finetune", "--save_total_limit", "-1"),
    _flag("finetune", "--per_device_batch_size", "0"),
    _flag("finetune", "--gradient_accumulation_steps", "1.5"),
    _flag("finetune", "--max_steps", "0"),
    _flag("finetune", "--lora_r", "0", "--lora"),
    _flag("finetune", "--lora_dropout", "1", "--lora"),
    _flag("finetune", "--lora_target_modules", "nothing", "--lora"),
    _flag("finetune", "--lora_modules_to_save", "nothing", "--lora"),
    _flag("finetune", "--optim", "nonsense"),
    _flag("finetune", "--lr_scheduler_type", "nonsense"),
    _flag("finetune", "--report_to", "nonsense"),
    _flag("finetune", "--report_to", "wandb"),
    _flag("finetune", "--select_by", "hit@10"),
    _flag("finetune", "--tasks", "seqrec,,seqrec", told="--train_prompt_sample_num|--tasks"),
    _flag("finetune", "--train_prompt_sample_num", "1,1,1,1,1,-1"),
    _flag("finetune", "--train_prompt_sample_num", "1,1,1,1,1,²"),
    _flag("finetune", "--train_data_sample_num", "1,1,1,1,1," + "9" * 30),
    _flag("finetune", "--valid_prompt_id", "99", "--no-sample_valid", told="--valid_prompt_id 99"),
    _flag("finetune", "--valid_prompt_sample_num", "99"),
    _flag("finetune", "--load_in_4bit"),
    _flag("finetune", "--fp16", "--bf16"),
    _flag("finetune", "--no_such_flag"),
    _flag("finetune", "--seed"),
    _flag("test", "--num_beams", "0"),
    _flag("test", "--sample_num", "0"),
    _flag("test", "--test_batch_size", "-1"),
    _flag("test", "--metrics", "hit@0"),
    _flag("test", "--metrics", "hit@" + "9" * 5000),
    _flag("test", "--metrics", "hit@50"),
    _flag("test", "--test_task", "nonsense"),
    _flag("test", "--test_prompt_ids", "99"),
    _flag("test", "--test_prompt_ids", "²"),
    _flag("test", "--test_prompt_ids", "9" * 5000),
    _flag("test", "--dtype", "float8"),
    _flag("test", "--max_his_len", "-2"),
    _flag("evaluate", "--metrics", "nonsense@3"),
    _flag("evaluate", "--no_such_flag"),
    _flag("report", "--metrics", "hit"),
    _flag("recommend", "--history", "9" * 5000, told="item 9+.* is unknown"),
    _flag("recommend", "--history", "²", told="no item has the title"),
    _flag("recommend", "--history", "-5", told="no item has the title"),
    _flag("recommend", "--top_k", "0"),
    _flag("recommend", "--users", "nobody", told="user 'nobody' is not in"),
    _flag("recommend", "--prompt_id", "99"),
    _flag("recommend", "--query", " ", told="query must be a text"),
    _flag("recommend", "--query", "word " * 5000, told="tokens"),
    _flag("recommend", "--format", "xml"),
    *(
        _flag(command, flag, "\udcff", told=f"{flag}.*not valid UTF-8")
        for command, flag in (
            ("recommend", "--query"),
            ("recommend", "--history"),
            ("recommend", "--users"),
            ("recommend", "--requests"),
            ("report", "--results_file"),
            ("report", "--table_file"),
            ("report", "--metrics"),
            ("evaluate", "--predictions"),
            ("evaluate", "--metrics"),
            ("test", "--ckpt_path"),
            ("finetune", "--optim"),
        )
    ),
    *(
        _flag(command, flag, value)
        for command, flag in (
            ("test", "--results_file"),
            ("evaluate", "--results_file"),
            ("evaluate", "--predictions"),
            ("report", "--results_file"),
            ("report", "--table_file"),
        )
        for value in ("", "/", ".")
    ),
    _flag("finetune", "--output_dir", ""),
    _flag("finetune", "--base_model", ""),
]

PLACES = [
    *(
        Abuse(f"{flag} {where}", command, told, broken, (flag, where))
        for command, flag, name in (
            ("finetune", "--output_dir", "out"),
            ("test", "--results_file", "r.json"),
            ("evaluate", "--results_file", "r.json"),
            ("report", "--table_file", "r.table.md"),
        )
        for where, told, broken in (
            (f"/proc/nowhere/{name}", rf"{flag}.*/proc/nowhere|/proc/nowhere.*cannot be (written|made)", None),
            (f"{{w}}/requests.jsonl/{name}", r"requests\.jsonl", None),
            (f"{{w}}/loop/{name}", "loop", loop("loop")),
            (f"{{w}}/{'x' * 300}/{name}", "File name too long", None),
        )
    ),
    Abuse("a file for the output folder", "finetune", "is there and is no folder", write("out", b"x")),
    Abuse("a loop for the output folder", "finetune", "is there and is no folder", loop("out")),
    Abuse("a lock that is a folder", "finetune", "out: cannot be made", folder(".out.lock")),
    Abuse(
        "the base model as the output folder", "finetune", "base model's own folder", flags=("--output_dir", "{w}/base")
    ),
    Abuse("a link to the base model as the output folder", "finetune", "base model's own folder", link("out", "base")),
    Abuse("a run in the output folder", "finetune", "holds a run already", flags=("--output_dir", "{w}/run")),
    Abuse(
        "a model of others in the output folder",
        "finetune",
        "not of a run",
        flags=("--output_dir", "{w}/base2", "--overwrite_output_dir"),
        broken=copy("base/config.json", "base2/config.json"),
    ),
    Abuse("a folder for the results", "test", r"r\.json: is a folder", folder("new/r.json")),
    Abuse(
        "a folder for the predictions", "test", r"r\.predictions\.jsonl: is a folder", folder("new/r.predictions.jsonl")
    ),
    Abuse("a file for the partial predictions", "test", r"r\.partial", write("new/r.partial", b"x")),
    Abuse("results of others", "test", r"r\.json: is not a results file.*name another", write("new/r.json", {"a": 1})),
    Abuse(
        "results of others and --restart",
        "test",
        r"r\.json: broken JSON.*name another",
        write("new/r.json", b"my thesis"),
        ("--restart",),
    ),
    *(
        Abuse(f"no room for more than {room} bytes", command, "cannot be written", None, flags, room)
        for command, room, flags in (
            ("test", 0, ()),
            ("test", 200, ()),
            ("test", 5000, ("--results_file", "{w}/deep/new/r.json", "--his_sep", "x" * 6000)),
            ("report", 0, ()),
            ("report", 2000, ()),
            ("evaluate", 100, ("--results_file", "{w}/new/e.json")),
        )
    ),
    Abuse(
        "a partial folder of others",
        "test",
        r"r\.partial/thesis\.md",
        write("new/r.partial/thesis.md", b"x"),
        ("--restart",),
    ),
    Abuse("a folder for the page", "report", r"r\.html", folder("results/r.html")),
    Abuse("a page of others", "report", r"r\.html: exists and is no page", write("results/r.html", b"<html>")),
    Abuse("a pipe for the page", "report", r"r\.html", pipe("results/r.html")),
    Abuse("a folder for the table", "report", r"r\.table\.md", folder("results/r.table.md")),
    Abuse("a table without .md", "report", "must end in .md", flags=("--table_file", "{w}/new/table.txt")),
    Abuse(
        "a file that is there", "evaluate", "--results_file .* exists", flags=("--results_file", "{w}/requests.jsonl")
    ),
]
