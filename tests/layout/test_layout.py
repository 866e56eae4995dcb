"""The folder tree is the architecture: these tests keep it so."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = ("proto", "metadata", "bookies", "serving", "client")
TOP_LEVEL = {*SOURCE_ROOTS, "tests", "deploy"}

PURE = (
    *(f"proto/magnetar/wire/{path.name}" for path in (ROOT / "proto/magnetar/wire").glob("*.py")),
    *(f"metadata/magnetar/metadata/{name}.py" for name in ("records", "copy_txns")),
    *(f"bookies/magnetar/ledger/{name}.py" for name in ("quorum", "writer", "recovery", "reads", "placement")),
    *(f"bookies/magnetar/repair/{name}.py" for name in ("copying", "throttle", "audit")),
    *(f"bookies/magnetar/repair/{name}.py" for name in ("planner", "operations", "operation_txns", "operation_rates")),
    *(f"serving/magnetar/managed_log/{name}.py" for name in ("chain", "cursor", "cache")),
    *(f"serving/magnetar/broker/{name}.py" for name in ("dispatch", "redelivery", "dedup", "flow", "layout")),
    *(f"serving/magnetar/broker/{name}.py" for name in ("hand_off", "loads", "balancer")),
    *(f"client/magnetar/client/{name}.py" for name in ("batching", "inflight", "acks", "backoff")),
)
IMPURE_IMPORTS = {"asyncio", "grpc", "google", "time", "random", "logging", "structlog", "threading", "socket"}
FORBIDDEN_MODULES = {"utils", "util", "common", "helpers", "helper", "base", "manager", "misc"}
FUNCTION_LINES_MAX = 70


def sources() -> Iterator[Path]:
    for root in SOURCE_ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            if not path.name.endswith("_pb2.py"):
                yield path


def test_the_top_level_folders_are_the_fixed_ones() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    folders = {line.partition("/")[0] for line in listing.stdout.splitlines() if "/" in line}
    assert {folder for folder in folders if not folder.startswith(".")} == TOP_LEVEL


def test_the_namespace_package_has_no_init_file_and_every_subpackage_has_one() -> None:
    for root in SOURCE_ROOTS:
        namespace = ROOT / root / "magnetar"
        assert not (namespace / "__init__.py").exists()
        for folder in {path.parent for path in namespace.rglob("*.py")}:
            assert (folder / "__init__.py").exists(), folder
        for package in namespace.iterdir():
            if package.is_dir() and package.name != "__pycache__":
                assert (package / "py.typed").exists(), package


def test_every_source_root_has_a_readme() -> None:
    for folder in TOP_LEVEL:
        assert (ROOT / folder / "README.md").exists(), folder


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_nothing_that_acts(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.partition(".")[0])
            assert not (node.module.startswith("magnetar.") and node.module.endswith("_pb2")), name
            assert node.module != "magnetar.v1", name
    assert not imported & IMPURE_IMPORTS, name


@pytest.mark.parametrize("path", list(sources()), ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_fit_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_no_module_is_named_for_nothing() -> None:
    for path in sources():
        assert path.stem not in FORBIDDEN_MODULES, path
        assert path.parent.name not in FORBIDDEN_MODULES, path


def test_every_module_says_what_it_is() -> None:
    for path in sources():
        text = path.read_text()
        if text.strip():
            assert ast.get_docstring(ast.parse(text)), path


def test_the_wheel_and_the_editable_install_name_the_same_roots() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert hatch["dev-mode-dirs"] == list(SOURCE_ROOTS)
    assert hatch["targets"]["wheel"]["packages"] == [f"{root}/magnetar" for root in SOURCE_ROOTS]


def test_the_client_and_the_command_start_without_what_only_servers_need() -> None:
    program = (
        "import sys; import magnetar.client, magnetar.cli.verbs; "
        "heavy = {'rocksdict', 'pyroaring', 'uvloop', 'prometheus_client', 'structlog', 'magnetar.node'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
