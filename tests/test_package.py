"""The wheel holds what it should, no bare name leaks, and the heavy packages are optional."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipelines", "models", "slurm", "tools")
SOURCES = [ROOT / "train.py", *(file for package in PACKAGES for file in sorted((ROOT / package).glob("*.py")))]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_mapping_is_complete() -> None:
    mapping = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert folders == set(PACKAGES)
    assert set(mapping["packages"]) == {"cossl", *(f"cossl.{name}" for name in folders)}
    assert set(mapping["package-dir"]) == set(mapping["packages"])
    assert [file.name for file in ROOT.glob("*.py")] == ["train.py"]


def test_the_wheel_imports_from_another_directory(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f"cossl/{file.relative_to(ROOT)}" for file in SOURCES}
    assert expected == {name for name in names if name.endswith(".py")}
    assert {name.split("/")[0] for name in names} == {"cossl", "cossl-0.1.0.dist-info"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # PYTHONPATH comes before the editable install, so the files found are the wheel's.
    code = "import cossl.train, cossl.tools.cli, cossl.models.heads; print(cossl.train.__file__)"
    found = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert Path(found.strip()) == tmp_path / "site" / "cossl" / "train.py"


@pytest.mark.parametrize("package", ["ffcv", "nvidia.dali", "submitit"])
def test_a_heavy_package_is_imported_by_one_file_and_inside_a_function(package: str) -> None:
    users = set()
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            )
            if any(name and (name == package or name.startswith(package + ".")) for name in names):
                users.add(file.name)
                assert node not in tree.body, f"{file.name} imports {package} at module level"
    assert users <= {"ffcv": {"ffcv_loader.py"}, "nvidia.dali": {"dali_loader.py"}, "submitit": {"submit.py"}}[package]


def test_without_ffcv_the_torch_loader_serves_and_convert_says_how_to_get_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['ffcv'] = None\n"
        "import importlib.util as u, sys; sys.argv = ['cossl', 'convert', 'pictures', 'out.beton']\n"
        "from cossl.tools.cli import main; main()"
    )
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    (tmp_path / "pictures" / "class" / "a.jpg").write_bytes(b"x")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("cossl convert: ffcv is not installed")
    assert "apt-get install" in done.stderr
    assert not (tmp_path / "out.beton").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["tarin"], "did you mean train?"), (["convert", "nowhere", "x.beton"], "nowhere"), (["convert", "a", "b", "--mod", "raw"], "--mod")],
)
def test_the_command_line_answers_mistakes_in_one_line(tmp_path: Path, argv: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "cossl.tools.cli", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_imports_keep_their_direction_and_have_no_side_effects() -> None:
    run(str(Path(sys.executable).parent / "lint-imports"), cwd=ROOT)
    state = "(torch.get_num_threads(), torch.initial_seed())"
    code = f"import torch; before = {state}; import cossl.train; assert before == {state}"
    assert run(sys.executable, "-c", code, cwd=ROOT) == ""
