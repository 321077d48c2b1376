"""The wheel holds what it should, no bare name leaks, and the heavy packages are optional."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from encoded import encoded, picture

from cossl.tools import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipelines", "models", "slurm", "tools")
SOURCES = [ROOT / "__init__.py", ROOT / "train.py", *(file for package in PACKAGES for file in sorted((ROOT / package).glob("*.py")))]


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
    assert sorted(file.name for file in ROOT.glob("*.py")) == ["__init__.py", "train.py"]


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
    assert users <= {"ffcv": {"ffcv_stock.py"}, "nvidia.dali": {"dali_loader.py"}, "submitit": {"submit.py"}}[package]


def test_without_ffcv_betons_are_written_and_read(tmp_path: Path) -> None:
    """ffcv's format, without ffcv: only the benchmark's peer needs the package, and says how to get it."""
    code = (
        "import sys; sys.modules['ffcv'] = None; from pathlib import Path\n"
        "from cossl.pipelines import make_loader; from cossl.pipelines.batch import LoaderSpec\n"
        "from cossl.pipelines.views import evaluation\n"
        "from cossl.pipelines.convert import convert; from cossl.pipelines.ffcv_stock import require_ffcv\n"
        "convert(Path('pictures'), Path('out.beton'), progress=False)\n"
        "loader = make_loader('auto', Path('out.beton'), LoaderSpec(evaluation(32), 2, shuffle=False))\n"
        "print(type(loader).__name__, [tuple(batch.views[0].shape) for batch in loader.epoch(0)])\n"
        "try: require_ffcv()\n"
        "except ImportError as error: print(error)"
    )
    (tmp_path / "pictures" / "class").mkdir(parents=True)
    for name in ("a", "b", "c"):
        (tmp_path / "pictures" / "class" / f"{name}.jpg").write_bytes(encoded(picture()))
    loader, missing = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert loader == "FfcvLoader [(1, 2, 3, 32, 32), (1, 1, 3, 32, 32)]"
    assert re.match(r"ffcv is not installed .*apt-get install .*\.\[ffcv\]", missing)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(["tarin"], "did you mean train?"), (["convert", "nowhere", "x.beton"], "nowhere"), (["convert", "a", "b", "--mod", "raw"], "--mod")],
)
def test_the_command_line_answers_mistakes_in_one_line(tmp_path: Path, argv: list[str], said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "cossl.tools.cli", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_help_may_be_cut_short() -> None:
    """`cossl convert --help | head`: whoever reads has enough, which is no mistake to report."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cossl.tools.cli", "convert", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("verb", ["convert", "verify", "bench", "doctor"])
def test_ctrl_c_ends_any_command_in_one_line(verb: str) -> None:
    code = f"""
import sys
from types import SimpleNamespace
from unittest import mock
from cossl.tools import cli
def interrupted(argv): raise KeyboardInterrupt
sys.argv = ["cossl", {verb!r}]
module = SimpleNamespace(**{{function: interrupted for _, function, _ in cli.VERBS.values()}})
with mock.patch.object(cli, "import_module", lambda name: module):
    cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, f"cossl {verb}: stopped\n")


def test_imports_keep_their_direction_and_have_no_side_effects() -> None:
    run(str(Path(sys.executable).parent / "lint-imports"), cwd=ROOT)
    state = "(torch.get_num_threads(), torch.initial_seed())"
    code = f"import torch; before = {state}; import cossl.train; assert before == {state}"
    assert run(sys.executable, "-c", code, cwd=ROOT) == ""


def test_help_waits_for_no_network_to_be_built() -> None:
    """torchvision brings torch._dynamo, a second of imports, and timm brings torchvision: only what builds a network takes them."""
    verbs = {verb: module for verb, (module, _, _) in cli.VERBS.items() if verb in ("train", "eval", "export", "robustness", "locality")}
    code = f"import sys, importlib\nfor module in {sorted(set(verbs.values()))}: importlib.import_module(module)\n"
    assert run(sys.executable, "-c", f"{code}print({{'torchvision', 'timm', 'torch._dynamo'}} & set(sys.modules))", cwd=ROOT) == "set()\n"
