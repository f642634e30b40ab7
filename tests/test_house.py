"""What keeps the house in order: a public name has one meaning, imports run one way, docs and `--help` agree."""

import ast
import re
from collections import defaultdict
from pathlib import Path

from running import ROOT, as_script

FOLDERS = ("convert", "data_process", "index", "metrics")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
SCRIPTS = [path for path in SOURCES if "\nif __name__ ==" in path.read_text(encoding="utf-8")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOT_MODULES = {path.stem for path in ROOT.glob("*.py")}
EXPLAINED = re.compile(r"  -\S[^\n]*?(  +\S|\n {10,}\S)", re.S)
# flags of other programs, and those that a page says are gone or wrong
FOREIGN = """nproc_per_node master_port nnodes rdzv_backend rdzv_endpoint rdzv_id node_rank master_addr help requeue nodes
ntasks-per-node gpus-per-node word_drop_ratio root plm_checkpoint no-deps""".split()


def defined(path: Path) -> set[str]:
    """The public names that a module defines."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in names if not name.startswith("_")} - {"main"}


def test_no_public_name_is_defined_twice():
    where = defaultdict(list)
    for path in SOURCES:
        for name in defined(path):
            where[name].append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in where.items() if len(paths) > 1} == {}


def test_index_stands_alone():
    for path in (ROOT / "index").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top not in ROOT_MODULES or (ROOT / "index" / f"{top}.py").exists(), f"{path}: imports {name}"


def test_no_import_is_excused():
    tracked = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert [path.name for path in tracked if re.search(r"noqa: ?E402", path.read_text(encoding="utf-8"))] == []


def test_the_readme_is_read_in_two_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 105


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_architecture_says_what_each_module_and_folder_owns():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = [f"{name}.py" for name in ROOT_MODULES] + [f"{path.parent.name}/" for path in ROOT.glob("*/*.py")]
    assert [name for name in sorted(set(names)) if not re.search(rf"^\| .*`{re.escape(name)}`.* \|", page, re.M)] == []


def test_help_teaches_and_docs_name_flags_that_exist():
    """Every script's help has an example of its command and explains each flag; every flag in a page is one of a script's."""
    known, wrong = set(FOREIGN), []
    for path in SCRIPTS:
        process = as_script(path, "--help")
        shown, where = process.stdout, path.relative_to(ROOT).as_posix()
        if process.returncode or not re.search(rf"(python|torchrun|bash|nohup).* \S*{re.escape(path.name)}", shown):
            wrong.append(f"{where}: no help with an example of the command")
        known |= {flag[2:] for flag in re.findall(r"--[\w-]+", shown)}
        blocks = re.split(r"\n(?=  -)", shown)[1:]  # a flag and what explains it
        wrong += [f"{where}: {block.split()[0]} is not explained" for block in blocks if not EXPLAINED.match(block)]
    for path in [*ROOT.glob("benchmarks/*"), *ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), *ROOT.glob("index/*.sh")]:
        known |= set(re.findall(r"--([\w-]+)", path.read_text(encoding="utf-8"))) if path.is_file() else set()
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", page.read_text(encoding="utf-8")):
            if flag not in known and flag.replace("no-", "", 1) not in known:
                wrong.append(f"{page.name}: no script has --{flag}")
    assert not wrong, "\n".join(wrong)
