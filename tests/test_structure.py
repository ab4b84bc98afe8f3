"""What the house promises: imports point down, no framework at import, no pickle, sorted public names."""

import ast
import subprocess
import sys
from pathlib import Path

import koopman_hpo

ROOT = Path(koopman_hpo.__file__).parent
LAYERS = [
    {"errors"},
    {"kernels", "files", "transforms", "snapshots", "unread"},
    {"problem", "hyperparameters"},
    {"space"},
    {"optimizers", "tangent", "batches"},
    {"checks"},
    {"devices", "directions"},
    {"oracle"},
    {"engine"},
    {"inner"},
    {"koopman", "outer", "exact"},
    {"krylov"},
    {"guard", "strategies", "history"},
    {"trust"},
    {"state"},
    {"settings", "modes"},
    {"closing", "resume"},
    {"final"},
    {"tuner"},
    {"checkpoint", "recipe"},
]
TOP = {"__init__", "cli", "demo", "doctor", "report"}  # the package's face, and the command line with what it runs
CORE = {"numpy", "numba", "scipy", "koopman_hpo"}


def imports(path):
    """(module, is_inside_a_function) of every import that runs, type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    skip = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)}
    lazy = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if node in skip:
            continue
        if isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT.parent).with_suffix("").parts
            head = ".".join(package[: len(package) - node.level]) if node.level else ""
            base = ".".join(x for x in (head, node.module) if x)
            names = [f"{base}.{a.name}" for a in node.names] if base == "koopman_hpo" else [base]
            yield from ((name, node in lazy) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, node in lazy) for a in node.names)


def test_imports_point_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        if part in TOP:
            continue
        assert part in level, f"{part} has no layer"
        for name, _ in imports(path):
            if name.startswith("koopman_hpo."):
                other = name.split(".")[1]
                assert other == part or level[other] < level[part], f"{path.name} imports {other}, which is not below it"


def test_the_core_depends_on_numpy_numba_and_scipy_alone():
    for path in ROOT.rglob("*.py"):
        if path.stem in TOP - {"__init__"}:  # the command line may use adapters and extras; nothing imports it
            continue
        for name, lazy in imports(path):
            top = name.split(".")[0]
            assert top in CORE or top in sys.stdlib_module_names or lazy, f"{path.name} imports {top}"
            assert top not in {"pickle", "cloudpickle", "joblib"}, f"{path.name} imports {top}"


def test_importing_the_library_pulls_in_no_framework():
    code = "import sys, koopman_hpo; print(*sorted(m.split('.')[0] for m in sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "jax", "autograd", "matplotlib", "rich", "tqdm", "sklearn", "pandas"}


def test_public_names_are_sorted_and_there():
    names = koopman_hpo.__all__
    assert names == sorted(names)
    assert all(hasattr(koopman_hpo, n) for n in names)


def test_every_public_name_says_what_it_is():
    for name in koopman_hpo.__all__:
        assert (getattr(koopman_hpo, name).__doc__ or "").strip(), f"{name} has no docstring"


def test_types_are_shipped():
    assert (ROOT / "py.typed").exists()
