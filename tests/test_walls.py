"""The walls of ARCHITECTURE.md as data: who may import whom, and which calls stay out of where."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"mesh", "gossip", "node", "rag", "client"}

MAY_IMPORT = {
    "mesh": {"mesh"},
    "gossip": {"gossip", "mesh"},
    "rag": {"rag"},
    "client": {"client"},
    "node": {"node", "gossip", "mesh", "rag"},
}

# Pure packages: no I/O, clock, threads, global randomness, tensors.
BANNED_MODULES = {
    package: {
        *("asyncio", "socket", "ssl", "select", "threading", "multiprocessing", "subprocess", "os", "pathlib"),
        *("time", "datetime", "secrets", "logging", "structlog", "torch", "transformers", "aiohttp", "numpy"),
    }
    for package in ("mesh", "gossip")
}

# Heavy libraries are imported inside functions, so that `python -m node --help` does not pay for them.
LAZY = {"torch", "transformers", "accelerate", "lancedb", "sentence_transformers", "llguidance"}
MAY_IMPORT_TORCH_AT_TOP = "node/engine"

UNSAFE = {"eval", "exec", "pickle", "marshal", "shelve"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide walls"
            names.append(node.module or "")
    return names


def top_level_imports(tree: ast.Module) -> list[str]:
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return imports(ast.Module(body=body, type_ignores=[]))


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_between_packages(package: str) -> None:
    for path in sources(package):
        for name in imports(ast.parse(path.read_text())):
            top = name.split(".")[0]
            assert top not in OURS or top in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", sorted(BANNED_MODULES))
def test_pure_packages_stay_pure(package: str) -> None:
    for path in sources(package):
        for name in imports(ast.parse(path.read_text())):
            assert name.split(".")[0] not in BANNED_MODULES[package], f"{path.relative_to(ROOT)} imports {name}"


def test_pure_packages_draw_no_global_randomness() -> None:
    for path in [path for package in BANNED_MODULES for path in sources(package)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
                assert node.attr == "Random", f"{path.relative_to(ROOT)}:{node.lineno} uses random.{node.attr}"


def test_heavy_libraries_are_imported_lazily() -> None:
    for path in sources("node") + sources("client"):
        where = path.relative_to(ROOT).as_posix()
        if where.startswith(MAY_IMPORT_TORCH_AT_TOP):
            continue
        for name in top_level_imports(ast.parse(path.read_text())):
            assert name.split(".")[0] not in LAZY, f"{where} imports {name} at its top"


def test_nothing_unsafe_touches_bytes() -> None:
    for path in [path for package in sorted(OURS) for path in sources(package)]:
        where = path.relative_to(ROOT).as_posix()
        tree = ast.parse(path.read_text())
        for name in imports(tree):
            assert name.split(".")[0] not in UNSAFE, f"{where} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in UNSAFE, f"{where}:{node.lineno} calls {node.func.id}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                call = f"{node.value.id}.{node.attr}"
                assert call not in {"torch.load", "yaml.load"}, f"{where}:{node.lineno} uses {call}"


def test_no_fault_is_swallowed() -> None:
    for path in [path for package in sorted(OURS) for path in sources(package)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in BROAD)
                silent = all(isinstance(line, ast.Pass) for line in node.body)
                assert not (broad and silent), f"{path.relative_to(ROOT)}:{node.lineno} swallows every fault"


BROAD = {"Exception", "BaseException"}
