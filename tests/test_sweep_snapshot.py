"""The copy of the source that a sweep's jobs run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cossl.models import run_folder
from cossl.slurm import submit
from cossl.slurm.submit import snapshot


def origin(what: str, cwd: Path, *path: Path) -> str:
    """The file that a Python there would import, found without importing it."""
    code = f"import importlib.util; print(importlib.util.find_spec({what!r}).origin)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def decoy(path: Path) -> Path:
    (path / "models").mkdir(parents=True)
    for name in ("train.py", "models/flags.py"):
        (path / name).write_text("raise RuntimeError('the wrong one')\n")
    return path


def test_the_copy_is_what_a_job_imports(tmp_path: Path) -> None:
    """Rather than the editable install, a checkout in the folder above, or one on the user's own PYTHONPATH."""
    source = tmp_path / "code" / snapshot(tmp_path)
    decoy(tmp_path / "code" / "cossl")
    decoy(tmp_path / "elsewhere" / "cossl")
    for what, file in (("cossl.train", "train.py"), ("cossl.slurm.point", "slurm/point.py"), ("cossl.models.flags", "models/flags.py")):
        assert origin(what, source, source) == str(source / "cossl" / file)
        assert origin(what, source, source, tmp_path / "elsewhere") == str(source / "cossl" / file)
    # As working folder too: a package with __init__.py goes before a folder of its name without one, wherever they are.
    assert origin("cossl.train", tmp_path / "code", source) == str(source / "cossl" / "train.py")
    assert origin("cossl.train", tmp_path) == str(run_folder.ROOT / "train.py")


def test_the_copy_says_of_which_commit_it_is(tmp_path: Path) -> None:
    source = tmp_path / "code" / snapshot(tmp_path)
    assert json.loads((source / "code.json").read_text()) == run_folder.code()
    python = {str(path.relative_to(source / "cossl")) for path in source.rglob("*.py")}
    assert {"train.py", "slurm/point.py", "models/flags.py", "pipelines/simd.py", "tools/cli.py"} <= python
    assert not any(name.startswith(("tests", "build")) for name in python)
    assert source.stat().st_mode & 0o777 == 0o755


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("train.py", "models/a.py", "pipelines/b.py"):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(f"# {name}\n")
    (tmp_path / "root" / "pipelines" / "__pycache__").mkdir()
    (tmp_path / "root" / "pipelines" / "__pycache__" / "b.f-1.py311.nbi").write_bytes(b"index")
    return tmp_path / "root"


def test_later_edits_change_nothing_and_make_another_copy(tmp_path: Path, root: Path) -> None:
    first = snapshot(tmp_path, root)
    content = {path: path.read_bytes() for path in (tmp_path / "code" / first).rglob("*") if path.is_file()}
    inode = (tmp_path / "code" / first).stat().st_ino
    assert snapshot(tmp_path, root) == first
    assert (tmp_path / "code" / first).stat().st_ino == inode
    (root / "models" / "a.py").write_text("# MODELS/a.py\n")  # of the same length
    second = snapshot(tmp_path, root)
    (root / "models" / "a.py").rename(root / "models" / "c.py")
    third = snapshot(tmp_path, root)
    assert len({first, second, third}) == 3
    assert {path: path.read_bytes() for path in content} == content
    assert {path.name for path in (tmp_path / "code").iterdir()} == {first, second, third}


def test_of_two_that_copy_at_once_the_first_wins(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rival(part: Path, text: str) -> None:
        monkeypatch.undo()
        snapshot(tmp_path, root)

    monkeypatch.setattr(submit, "replace_text", rival)
    name = snapshot(tmp_path, root)
    assert [path.name for path in (tmp_path / "code").iterdir()] == [name]
    assert (tmp_path / "code" / name / "code.json").exists()


def test_a_copy_that_cannot_be_put_in_place_is_an_error(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        snapshot(tmp_path, root)
    assert list((tmp_path / "code").iterdir()) == []


def test_compiled_kernels_come_along_and_are_used(tmp_path: Path) -> None:
    call = (
        "import sys, numpy as np; from cossl.pipelines.geometry import uniform; uniform(np.uint64(3), 1, 0.0, 1.0);"
        " print(uniform.__wrapped__.__code__.co_filename if hasattr(uniform, '__wrapped__') else uniform.py_func.__code__.co_filename,"
        " sum(uniform.stats.cache_hits.values()), sum(uniform.stats.cache_misses.values()))"
    )

    def called(cwd: Path) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"PYTHONPATH": str(cwd)}
        done = subprocess.run([sys.executable, "-c", call], cwd=cwd, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    called(tmp_path)  # so that there is something to come along
    source = tmp_path / "code" / snapshot(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in (source / "cossl" / "pipelines" / "__pycache__").glob("*.nb[ci]")}
    assert any(name.startswith("geometry.uniform") and name.endswith(".nbc") for name in before)
    assert called(source) == [str(source / "cossl" / "pipelines" / "geometry.py"), "1", "0"]
    after = {path.name: path.stat().st_mtime_ns for path in (source / "cossl" / "pipelines" / "__pycache__").glob("*.nb[ci]")}
    assert after == before
