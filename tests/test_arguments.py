"""The flags: the original's names and defaults, and lists that do not fit."""

import ast
from pathlib import Path

import pytest

from arguments import (
    ALL,
    LORA,
    TRAIN,
    Role,
    add_data,
    add_global,
    add_test,
    add_train,
    make_parser,
    parse_given,
    parse_tasks,
    with_role,
)
from utils import UserError

DEFAULTS = """
seed=42 base_model=./llama-7b/ output_dir=./ckpt/ data_path=
tasks=seqrec,item2index,index2item,fusionseqrec,itemsearch,preferenceobtain
dataset=Games index_file=.index.json max_his_len=20 add_prefix=False only_train_response=False
valid_prompt_id=0 sample_valid=True
valid_prompt_sample_num=2 optim=adamw_torch epochs=4 learning_rate=2e-05 per_device_batch_size=8
gradient_accumulation_steps=2 logging_step=10 model_max_length=2048 weight_decay=0.01 lora_r=8 lora_alpha=32
lora_dropout=0.05 lora_target_modules=q_proj,v_proj,k_proj,o_proj,gate_proj,down_proj,up_proj
lora_modules_to_save=embed_tokens,lm_head resume_from_checkpoint=None warmup_ratio=0.01 lr_scheduler_type=cosine
save_and_eval_strategy=epoch save_and_eval_steps=1000 fp16=False bf16=False deepspeed=./config/ds_z3_bf16.json
ckpt_path= lora=False filter_items=False results_file=./results/test-ddp.json test_batch_size=1 num_beams=20
sample_num=-1 gpu_id=0 test_prompt_ids=0 metrics=hit@1,hit@5,hit@10,ndcg@5,ndcg@10 test_task=SeqRec
"""


def parser_of(*groups):
    parser = make_parser("x")
    for group in groups:
        group(parser)
    return parser


def test_defaults_are_the_originals():
    train = parser_of(add_global, add_data, add_train).parse_args([])
    test = parser_of(add_global, add_data, add_test).parse_args([])
    for pair in DEFAULTS.split():
        name, value = pair.split("=", 1)
        held = [str(getattr(args, name)) for args in (train, test) if hasattr(args, name)]
        assert held and set(held) == {value}, name
    assert train.his_sep == ", "


def test_a_task_list_with_its_numbers():
    assert parse_tasks("seqrec, ItemSearch", "2,1", "0,50") == [("seqrec", 2, 0), ("itemsearch", 1, 50)]


def test_numbers_that_are_not_given_are_the_originals():
    args = parser_of(add_data).parse_args([])
    found = parse_tasks(args.tasks, args.train_prompt_sample_num, args.train_data_sample_num)
    assert found == parse_tasks(args.tasks, "1,1,1,1,1,1", "0,0,0,100000,0,0")
    assert parse_tasks("seqrec", None, None) == [("seqrec", 1, 0)]
    assert parse_tasks("index2item,fusionseqrec", "2,3", None) == [("index2item", 2, 0), ("fusionseqrec", 3, 100_000)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "seqrec,typo"], "unknown task 'typo'"),
        (["--tasks", "seqrec,seqrec"], "seqrec is named twice"),
        (["--tasks", ","], "names no task"),
        (
            ["--tasks", "seqrec", "--train_prompt_sample_num", "1,1"],
            "sample_num has 2 numbers, but --tasks names 1 tasks",
        ),
        (["--train_data_sample_num", "0,0"], "train_data_sample_num has 2 numbers, but --tasks names 6"),
        (["--train_data_sample_num", "0,0,0,-1,0,0"], "not a list of whole numbers"),
        (["--train_prompt_sample_num", "1,1,1,1,1,0"], "must be 1 or more"),
    ],
)
def test_lists_that_do_not_fit(flags, message):
    args = parser_of(add_data).parse_args(flags)
    with pytest.raises(UserError, match=message):
        parse_tasks(args.tasks, args.train_prompt_sample_num, args.train_data_sample_num)


def test_batch_size_is_a_number_or_auto():
    parser = parser_of(add_test)
    assert parser.parse_args(["--test_batch_size", "auto"]).test_batch_size == "auto"
    assert parser.parse_args(["--test_batch_size", "8"]).test_batch_size == 8


@pytest.mark.parametrize(
    "flags",
    """--test_batch_size 0|--seed -1|--seed 18446744073709551616|--epochs nan|--epochs 0|--learning_rate nan
    --learning_rate inf|--learning_rate 0|--warmup_ratio -1|--warmup_ratio 1|--model_max_length 0|--model_max_length -5
    --weight_decay -3|--save_total_limit -1|--save_total_limit 0|--sample_num 0|--max_steps 0|--num_beams 0|--gpu_id -1
    --lora_dropout 1|--lora_r 0|--eval_ranking -1|--per_device_batch_size 1e3|--logging_step 0|--max_his_len -2
    --dtype int8|--seed ²|--num_beams 999999999999999999999999|--dataset \udcff|--no_such_flag 1|--seed""".replace(
        "\n    ", "|"
    ).split("|"),
)
def test_what_is_out_of_range_is_one_line_that_names_the_flag(flags):
    parser = parser_of(add_global, add_data, add_test)
    if any(f"--{flag.name}" == flags.split()[0] for flag in TRAIN + LORA):
        parser = parser_of(add_global, add_data, add_train)
    with pytest.raises(UserError) as caught:
        parser.parse_args(flags.split())
    assert flags.split()[0] in str(caught.value) and "\n" not in str(caught.value)


def test_which_prompt_flags_were_given():
    parser = parser_of(add_global, add_data, add_test)
    args, given = parse_given(parser, ["--max_his_len", "20", "--no_eos"])
    assert given == {"max_his_len", "no_eos"}
    assert (args.max_his_len, args.no_eos, args.his_sep, args.add_prefix, args.prompt_file) == (
        20,
        True,
        ", ",
        False,
        None,
    )
    assert vars(args) == vars(parser.parse_args(["--no_eos"]))
    args, given = parse_given(parser, ["--dataset", "Games"])
    assert given == {"dataset"} and args.base_model == "./llama-7b/"


def test_every_flag_is_defined_once_and_has_one_role():
    roles = {}
    for flag in ALL:
        assert roles.setdefault(flag.name, flag.role) == flag.role
    assert {"output_dir", "deepspeed", "prompt_file"} <= with_role(Role.FREE) and "seed" in with_role(Role.RESULT)


def test_every_number_has_its_range_where_its_flag_is_defined():
    """No flag of any script is a bare `int` or `float`: NaN, -1 and 10^30 would come through."""
    root = Path(__file__).resolve().parents[1]
    for path in [*root.glob("*.py"), *root.glob("*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "type" and "tests" not in path.parts:
                assert ast.unparse(node.value) not in ("int", "float"), f"{path.relative_to(root)}:{node.lineno}"


def test_no_script_has_a_parser_that_speaks_in_several_lines():
    root = Path(__file__).resolve().parents[1]
    found = [path for path in [*root.glob("*.py"), *root.glob("*/*.py")] if "tests" not in path.parts]
    plain = [path.name for path in found if "= argparse.ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert plain == []
