"""What a checkpoint's pickles would import, found without running them.

    python convert/scan.py ./ckpt/Games/checkpoint-1000      # status 2 and a line a file if something foreign is there

DeepSpeed reads its shards, and the trainer its random states, with the full unpickler, which can run anything. So
every pickle of a folder is taken apart first (`pickletools`, nothing is imported or called) and compared with the
names that torch, DeepSpeed and transformers themselves write.
"""

from __future__ import annotations

import os
import pickletools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from arguments import make_parser
from utils import UserError, is_plain_name, run_main

ARCHIVE = b"PK\x03\x04"  # torch.load's own test; anything else it takes for bare pickles
DAMAGED = "<cut short or damaged>"
NO_FILE = "<not a regular file>"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")

_TORCH = {
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch._tensor._rebuild_from_type_v2",
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    *(f"torch.{kind}Storage" for kind in ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char")),
    *(f"torch.{kind}Storage" for kind in ("Byte", "Bool")),
    *(f"torch.{kind}" for kind in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool")),
}
_NUMPY = {
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
}
_DEEPSPEED = {
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.utils.tensor_fragment.tensor_fragment",
}
_TRAINER = {
    "accelerate.state.AcceleratorState",
    "accelerate.state.PartialState",
    "accelerate.utils.dataclasses.DistributedType",
    "accelerate.utils.dataclasses.DeepSpeedPlugin",
    "accelerate.utils.dataclasses.ComputeEnvironment",
    "accelerate.utils.dataclasses.DynamoBackend",
    "accelerate.utils.dataclasses.GradientAccumulationPlugin",
    "accelerate.utils.dataclasses.PrecisionType",
    "transformers.debug_utils.DebugOption",
    "transformers.integrations.deepspeed.HfDeepSpeedConfig",
    "transformers.integrations.deepspeed.HfTrainerDeepSpeedConfig",
    "transformers.trainer_pt_utils.AcceleratorConfig",
    "transformers.trainer_utils.EvaluationStrategy",
    "transformers.trainer_utils.FSDPOption",
    "transformers.trainer_utils.HubStrategy",
    "transformers.trainer_utils.IntervalStrategy",
    "transformers.trainer_utils.SaveStrategy",
    "transformers.trainer_utils.SchedulerType",
    "transformers.training_args.OptimizerNames",
    "transformers.training_args.ParallelMode",
    "transformers.training_args.TrainingArguments",
}
ALLOWED = frozenset(_TORCH | _NUMPY | _DEEPSPEED)
ALLOWED_IN = {"training_args.bin": ALLOWED | _TRAINER}  # nothing here or in the trainer unpickles that file


def pickle_globals(data: bytes) -> set[str]:
    """Every name, `module.name`, that unpickling `data` would import (protocols up to 2, which torch writes).

    Opcodes that torch never writes and that hide what they import (`STACK_GLOBAL`, `INST`, `EXT1`…) are reported as
    names in angle brackets.
    """
    found = set()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "GLOBAL":
            found.add(".".join(str(argument).split(" ", 1)))
        elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"):
            found.add(f"<{opcode.name}>")
    return found


def scan_file(path: Path) -> list[str]:
    """The foreign names of one file of `torch.save`, sorted; a name in angle brackets for what cannot be judged.

    Container and record are read with torch's own reader, so that this sees the very bytes that torch would unpickle.
    TorchScript archives and files from before torch 1.6 (a row of bare pickles) count as foreign.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if head != ARCHIVE:
        return [DAMAGED if ARCHIVE.startswith(head) else "<not a torch archive>"]
    try:
        reader = torch._C.PyTorchFileReader(str(path))
        if "constants.pkl" in reader.get_all_records():
            return ["<TorchScript>"]
        return sorted(pickle_globals(reader.get_record("data.pkl")) - ALLOWED_IN.get(path.name, ALLOWED))
    except (RuntimeError, ValueError, KeyError, IndexError, EOFError):
        return [DAMAGED]  # torch's reader is the one that would load it


def _is_pickle(path: Path) -> bool:
    """True for whatever a loader might unpickle: by its name, or because it begins like a pickle or an archive."""
    if path.suffix in PICKLE_SUFFIXES:
        return True
    with open(path, "rb") as file:
        head = file.read(4)
    return head == ARCHIVE or head[:1] == b"\x80"


def scan_checkpoint(folder: str | Path) -> dict[Path, list[str]]:
    """Files below `folder` that would import foreign code when unpickled → the names they would import.

    Nothing in them is run. An empty dictionary means: only what torch, DeepSpeed, numpy and the trainer write. Links
    that lead out of the folder, and a `latest` file (DeepSpeed's pointer to its shards) that does, are listed too.
    """
    root = Path(folder).resolve()
    found = {}
    for parent, folders, files in os.walk(root):
        for name in sorted(folders) + sorted(files):
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                found[path] = ["<a link out of the folder>"]
            elif not path.is_file() and not path.is_dir():
                found[path] = [NO_FILE]
            elif name == "latest" and path.is_file() and not is_plain_name(path.read_text(errors="replace").strip()):
                found[path] = ["<a path out of the folder>"]
            elif path.is_file() and _is_pickle(path) and (foreign := scan_file(path)):
                found[path] = foreign
    return found


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint whose pickles would import foreign code, or cannot be read to the end.

    Raises:
        UserError: names the first such file and what it wants to import.
    """
    found = scan_checkpoint(folder)
    for path, names in sorted(found.items(), key=lambda entry: entry[1] in ([NO_FILE], [DAMAGED])):
        if names == [NO_FILE]:
            raise UserError(f"{path}: not a regular file")
        if names == [DAMAGED]:
            raise UserError(f"{path}: cut short or damaged, not a whole file of torch.save; take another checkpoint")
        more = f" and {len(found) - 1} more files" if len(found) > 1 else ""
        raise UserError(f"{path}: would run foreign code when loaded ({', '.join(names[:3])}){more}; nothing was run")


def main(argv: list[str] | None = None) -> None:
    """Scan a folder and say what was found."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", help="a checkpoint, or a folder of checkpoints")
    folder = Path(parser.parse_args(argv).folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    check_checkpoint(folder)
    print(f"{folder}: no foreign code in its pickles")


if __name__ == "__main__":
    run_main(main)
