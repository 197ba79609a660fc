"""The package as a whole: light to import, its layers hold, and what is public is described."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tidegate

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "tidegate"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.stat().st_size)


def test_importing_tidegate_loads_nothing_heavy() -> None:
    heavy = "torch", "transformers", "onnxruntime", "numpy", "starlette", "sqlalchemy", "aiohttp", "pydantic"
    program = f"import sys, tidegate; print([name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_command_line_loads_no_torch_and_no_server_before_it_needs_them() -> None:
    heavy = "torch", "transformers", "onnxruntime", "starlette", "uvicorn", "sqlalchemy", "aiohttp"
    program = f"import sys, tidegate.cli; print([name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    for name in tidegate.__all__:
        assert getattr(tidegate, name) is not None


def test_imports_point_down_only() -> None:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("import-linter is not installed")
    checked = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_module_says_what_it_is_for(path: Path) -> None:
    described = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert described
    assert described[0].isupper() or described[0] == "`"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_what_a_module_offers_is_in_it_and_described(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    offered: set[str] = set()
    defined: dict[str, ast.AST] = {}
    known: set[str] = set()
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                offered = set(ast.literal_eval(value))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined[node.name] = node
            case ast.Assign(targets=targets):
                known |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                known.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                known |= {alias.asname or alias.name for alias in names}
    if path == SOURCE / "__init__.py":
        return  # its names are imported when they are used: see test_every_public_name_is_there
    assert offered <= known | set(defined)
    undescribed = [name for name in offered & set(defined) if not ast.get_docstring(defined[name])]  # type: ignore[arg-type]
    assert undescribed == []


def test_only_the_command_line_prints() -> None:
    for path in MODULES:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not prints or path.name == "cli.py", path


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    assert headings[0].split()[1] == tidegate.__version__
    assert f'version = "{tidegate.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
