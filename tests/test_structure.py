"""The house keeps its plan: imports run one way, without a cycle; functions and files stay small.

Read from the source, nothing is imported.
"""

import ast
import functools
import gc
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "open_qwen2vl"
# From the bottom; a module imports from its own floor and from those below it.
FLOORS = (
    (
        *("endpoint", "files", "lazy_names", "model_folders", "options", "output_lock", "pages", "places"),
        *("range_reads", "transfers"),
    ),
    ("modeling", "processing"),
    ("auto_classes",),
    ("families",),
    ("grounding", "data.storage"),
    ("data.documents", "data.engine"),
    ("data.packing", "data.scoring", "data.resharding", "data.extracting"),
    ("data.filtering",),
    ("data.recaptioning",),
    ("data",),
    ("evaluation",),
    ("decontamination",),
    ("trainer",),
    ("estimate", "mixing", "chat", "agent", "conversion"),
    ("cli",),
)
MOST_LINES, MOST_OF_A_FILE, MOST_OF_A_FUNCTION = 37_625, 350, 60
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name without `open_qwen2vl.`; the package itself is the empty name."""
    found = {}
    gc.disable()  # which would go through all that other tests have left, again and again while trees grow
    try:
        for path in sorted(PACKAGE.rglob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of the package that a module imports, also within functions and in `lazy_names`."""
    package = name if (PACKAGE / name.replace(".", "/") / "__init__.py").exists() else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if package else []
            target = ".".join([part for part in base if part] + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{target}.{alias.name}" if target else alias.name
                yield inner if inner in known else target
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("open_qwen2vl"):
            yield node.module.removeprefix("open_qwen2vl").removeprefix(".")


def floor(name: str) -> int:
    """The floor that a module is on."""
    while name not in FLOOR:
        assert "." in name, f"{name} is on no floor: give it one here and in docs/architecture.md"
        name = name.rpartition(".")[0]
    return FLOOR[name]


def graph() -> dict[str, set[str]]:
    """Who imports whom. A package is its `__init__`; that of the whole is left out: it imports when it is asked."""
    trees = modules()
    found = {name: set(imports(name, tree, set(trees))) - {name} for name, tree in trees.items() if name}
    return {name: {target for target in targets if target} for name, targets in found.items()}


def test_imports_run_one_way():
    against = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in sorted(targets)
        if floor(target) > floor(name)
    ]
    assert against == []


def test_no_cycle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def test_functions_files_and_the_whole_are_small():
    large, whole = set(), 0
    for name, tree in modules().items():
        path = PACKAGE / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        lines = len(path.read_text(encoding="utf-8").splitlines())
        whole += lines
        if lines > MOST_OF_A_FILE:
            large.add(name)
        large |= {
            f"{name}.{node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno + 1 > MOST_OF_A_FUNCTION
        }
    assert large == set()
    assert whole <= MOST_LINES


def test_no_code_of_a_checkpoint_runs_unasked():
    """transformers asks on the terminal where `trust_remote_code` is not given."""
    root = PACKAGE.parents[1]
    others = [path for folder in ("recipes", "benchmarks") for path in (root / folder).rglob("*.py")]
    trees = modules() | {str(path.relative_to(root)): ast.parse(path.read_text(encoding="utf-8")) for path in others}
    silent = [
        f"{name}, line {node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
        and not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []
