"""Files from elsewhere are data: whatever is wrong with one, it is refused in one line, or is what it was when it was whole.

Each case is a whole file after a few mishaps, read in a process of little room and time. Some are given a right checksum again, so that
what stands behind it is reached: such a file may be taken for what it says, and must do no harm.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import encoded, picture
from finished_sweeps import finish, point, results
from mutations import changed, damaged, refusal_or, survive
from saved_runs import DEMO, run_of

from cossl.models import checkpoint, load
from cossl.models.flags import flatten, sealed, unflatten
from cossl.pipelines import beton_writer
from cossl.pipelines.beton import ALLOCATION, FIELD, HEADER, Beton, manifest_digest, manifest_path, verify
from cossl.pipelines.beton_writer import ROW
from cossl.pipelines.convert import convert
from cossl.slurm.folder import Sweep, add_points, read_sweep, results_of
from cossl.tools import opened
from cossl.tools.export import export
from cossl.train import RESUME_MAY_CHANGE, Config

CASES = [pytest.param(100, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.long)]
pytestmark = pytest.mark.parametrize("count", CASES)


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------- betons


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four small pictures of two classes, two of them raw."""
    root = tmp_path_factory.mktemp("beton")
    for i in range(4):
        folder = root / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(encoded(picture(i, 12, 8)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beton_writer, "PAGE_BYTES", 4096)  # else each case would be of 16 MiB
        convert(root / "pictures", root / "x.beton", mode="proportion", num_workers=1, progress=False)
    return root / "x.beton"


def read_rows(path: Path) -> Beton:
    """Opens it, and every picture that it says it has."""
    found = Beton(path)
    for i in range(len(found)):
        assert len(found.payload(i)) == found.sizes[i]
        refusal_or(lambda i=i: found.open(i).load())
    return found


@pytest.mark.parametrize("proved", [True, False])
def test_beton(beton: Path, tmp_path: Path, count: int, proved: bool) -> None:
    whole, path = beton.read_bytes(), tmp_path / "y.beton"
    head, tail = HEADER.itemsize + 2 * FIELD.itemsize + 4 * ROW.itemsize, 4 * ALLOCATION.itemsize
    assert len(whole) < 20_000
    if proved:
        manifest_path(path).write_bytes(manifest_path(beton).read_bytes())

    def case(rng: np.random.Generator) -> None:
        at = [0, HEADER.itemsize + 2 * FIELD.itemsize, len(whole) - tail, 0][int(rng.integers(4))]
        end = {0: HEADER.itemsize if rng.random() < 0.5 else len(whole), len(whole) - tail: len(whole)}.get(at, head)
        content = whole[:at] + damaged(whole[at:end], rng) + whole[end:]
        put(path, content)
        if not proved:
            refusal_or(lambda: read_rows(path))
        elif not isinstance(refusal_or(lambda: verify(path, decode=0, num_workers=1)), Exception):
            assert content == whole

    survive(case, count)


@pytest.mark.parametrize("digest_is_right", [False, True])
def test_manifest(beton: Path, tmp_path: Path, count: int, digest_is_right: bool) -> None:
    path = put(tmp_path / "y.beton", beton.read_bytes())
    content = manifest_path(beton).read_bytes()
    whole = json.loads(content)
    del whole["sha256"]

    def case(rng: np.random.Generator) -> None:
        if digest_is_right:
            value = changed(whole, rng)
            put(manifest_path(path), as_json({**value, "sha256": manifest_digest(value)} if isinstance(value, dict) else value))
            refusal_or(lambda: verify(path, decode=0, num_workers=1))
            return
        put(manifest_path(path), damaged(content, rng))
        found = refusal_or(lambda: Beton(path).manifest)
        assert isinstance(found, Exception) or found == whole

    survive(case, count)


# ------------------------------------------------------------------------------------------------- configs


def test_flat_config(count: int) -> None:
    whole = json.loads(json.dumps(flatten(DEMO)))

    def case(rng: np.random.Generator) -> None:
        value = changed(whole, rng)
        found = refusal_or(lambda: unflatten(Config, value)) if isinstance(value, dict) else None
        if isinstance(found, Config):
            again = json.loads(json.dumps(flatten(found)))
            assert {key: again[key] for key in value} == value

    survive(case, count)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_of(DEMO, tmp_path_factory.mktemp("runs") / "run")
    export(opened.open_run(folder, "cpu"), folder / "export", ["safetensors"])
    return folder


def test_config_of_a_run(run: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load.load(run)
    monkeypatch.setattr(load, "load", lambda *_: encoder)  # the checkpoint is whole in all cases
    content = (run / "config.json").read_bytes()

    def case(rng: np.random.Generator) -> None:
        put(tmp_path / "config.json", damaged(content, rng) if rng.random() < 0.6 else as_json(changed(json.loads(content), rng)))
        found = refusal_or(lambda: opened.open_run(tmp_path, "cpu").config)
        if isinstance(found, Config):
            ours, theirs = flatten(found), flatten(DEMO)
            assert [key for key in theirs if ours[key] != theirs[key] and key not in RESUME_MAY_CHANGE] == []

    survive(case, count)


@pytest.mark.parametrize("digest_is_right", [False, True])
def test_export(run: Path, tmp_path: Path, count: int, digest_is_right: bool) -> None:
    config, weights = (run / "export" / "config.json").read_bytes(), (run / "export" / load.WEIGHTS).read_bytes()
    whole, value = load.load(run / "export"), json.loads(config)
    del value["sha256"]

    def case(rng: np.random.Generator) -> None:
        one, other = [(damaged(config, rng), weights), (config, damaged(weights, rng))][int(rng.integers(2))]
        if digest_is_right:
            other = damaged(weights, rng, 2000) if rng.random() < 0.9 else weights
            said = value | {"weights_sha256": hashlib.sha256(other).hexdigest()}
            said = changed(said, rng) if other == weights else said
            one = as_json(sealed(said)) if isinstance(said, dict) else as_json(said)
        put(tmp_path / "config.json", one)
        put(tmp_path / load.WEIGHTS, other)
        found = refusal_or(lambda: load.load(tmp_path))
        if not digest_is_right and not isinstance(found, Exception):
            assert all(torch.equal(weight, found.state_dict()[key]) for key, weight in whole.state_dict().items())

    survive(case, count // 10 if digest_is_right else count)  # 10 ms for each network that is built


# ------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    points = [point({"model.local_head": head, "seed": seed}, seed) for head in ("mlp2", "mlp3") for seed in (0, 1)]
    return add_points(read_sweep(tmp_path / "sweeps" / "heads"), points)


@pytest.mark.parametrize("digest_is_right", [False, True])
def test_sweep(sweep: Sweep, count: int, digest_is_right: bool) -> None:
    path = sweep.folder / "sweep.json"
    content = path.read_bytes()
    value = json.loads(content)
    del value["sha256"]

    def case(rng: np.random.Generator) -> None:
        put(path, damaged(content, rng))
        if digest_is_right:
            said = changed(value, rng)
            put(path, as_json(sealed(said) if isinstance(said, dict) else said))
        found = refusal_or(lambda: read_sweep(sweep.folder))
        if isinstance(found, Exception):
            return
        assert digest_is_right or found.points == sweep.points
        for one in found.points:
            assert found.run_dir(one).parent.resolve() == (sweep.folder.parent / "points").resolve()
            results_of(found.run_dir(one), one)

    survive(case, count)


def test_jobs(sweep: Sweep, count: int) -> None:
    one = {"point": sweep.points[0].identity, "job": "7_0", "grid": "heads", "cluster": "ours", "code": "c", "log": "l", "time": 1.0}

    def case(rng: np.random.Generator) -> None:
        lines = [as_json(changed(one, rng)) for _ in range(3)]
        put(sweep.folder / "jobs.jsonl", b"\n".join([as_json(one), *lines, damaged(as_json(one), rng), as_json(one)]) + b"\n")
        assert len(read_sweep(sweep.folder).jobs) >= 2

    survive(case, count)


def test_results(sweep: Sweep, count: int) -> None:
    one, right = sweep.points[0], sealed(results())
    folder = finish(sweep, one, as_json(right))
    files = {name: (folder / name).read_bytes() for name in ("results.json", "config.json")}

    def case(rng: np.random.Generator) -> None:
        name = list(files)[int(rng.integers(2))]
        damage = damaged(files[name], rng) if rng.random() < 0.5 else as_json(changed(json.loads(files[name]), rng))
        put(folder / name, damage)
        found = results_of(folder, one)
        put(folder / name, files[name])
        assert found in (None, results())

    survive(case, count)


# ------------------------------------------------------------------------------------------------- checkpoints


STATE: dict[str, Any] = {"model": {"w": torch.arange(60.0), "n": torch.ones(2, 3).half()}, "step": 7, "config": {"a": [1, None, 0.5]}}


def is_whole(state: Any) -> bool:
    return all(torch.equal(state["model"][key], weight) for key, weight in STATE["model"].items()) and (
        {key: state[key] for key in state if key != "model"} == {key: STATE[key] for key in STATE if key != "model"}
    )


def test_checkpoint(tmp_path: Path, count: int) -> None:
    path = tmp_path / "last.pt"
    checkpoint.write(path, STATE)
    whole = path.read_bytes()

    def case(rng: np.random.Generator) -> None:
        put(path, damaged(whole, rng) if rng.random() < 0.7 else whole[:-600] + damaged(whole[-600:], rng))
        found = refusal_or(lambda: checkpoint.load(path))
        assert isinstance(found, Exception) or is_whole(found)

    survive(case, count)


def packed(parts: list[tuple[str, bytes]], how: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return stream.getvalue()


def test_checkpoint_with_right_checksums(run: Path, tmp_path: Path, count: int) -> None:
    """Archives that are whole, of parts that are not."""
    (tmp_path / "here").mkdir()
    path, before = tmp_path / "here" / "last.pt", sorted(os.listdir(tmp_path))
    checkpoint.write(path, STATE)
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    paths = ["../../x", "/tmp/x", "..", "/", "a/../../b", "last/data.pkl", "x" * 60_000, "last/data/0\0", "last/data/-1", "\\..\\x"]

    def case(rng: np.random.Generator) -> None:
        own, i = list(parts), int(rng.integers(len(parts)))
        name, content = own[i]
        match rng.integers(8):
            case 0:
                own[i] = (paths[int(rng.integers(len(paths)))], content)
            case 1:
                own[i] = (name, bytes(int(rng.integers(1 << 12))))
            case 2:
                del own[i]
            case _:
                pickled = next(j for j, (name, _) in enumerate(own) if name.endswith("data.pkl"))
                own[pickled] = (own[pickled][0], damaged(own[pickled][1], rng))
        put(path, packed(own))
        found = refusal_or(lambda: checkpoint.load(path))
        if isinstance(found, dict):
            refusal_or(lambda: load.of_checkpoint(found, path))
        assert sorted(os.listdir(tmp_path)) == before
        assert os.listdir(tmp_path / "here") == ["last.pt"]

    survive(case, count)


def bomb() -> bytes:
    return packed([("last/data.pkl", b"\0" * (1 << 28)), ("last/version", b"3")], zipfile.ZIP_DEFLATED)


def overlapping() -> bytes:
    """One part of a MiB under a thousand names."""
    content = packed([(f"last/data/{i:04d}", b"\0" * (1 << 20) if i == 0 else b"") for i in range(1000)])
    at = content.index(b"PK\x01\x02")
    head, directory = content[:at], bytearray(content[at:])
    first = directory[16:28]
    place, step = 0, 46 + len("last/data/0000")
    while directory[place : place + 4] == b"PK\x01\x02":
        directory[place + 16 : place + 28] = first
        directory[place + 42 : place + 46] = struct.pack("<I", 0)
        place += step
    return head + bytes(directory)


def large_on_paper() -> bytes:
    """A part that says that it is of 4 GiB."""
    content = bytearray(packed([("last/data.pkl", b"\0" * 100)]))
    at = content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(content)


def after_a_pickle() -> bytes:
    """What torch wrote before it wrote archives, and an archive behind it."""
    stream = io.BytesIO()
    torch.save(STATE, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue() + packed([("last/data.pkl", b"")])


@pytest.mark.parametrize(
    ("make", "said"),
    [(bomb, "larger than it is"), (overlapping, "larger"), (large_on_paper, "larger"), (after_a_pickle, "does not begin as an archive")],
)
def test_hostile_archives(tmp_path: Path, count: int, make: Callable[[], bytes], said: str) -> None:
    path = put(tmp_path / "last.pt", make())

    def case(_: np.random.Generator) -> None:
        with pytest.raises(ValueError, match=said):
            checkpoint.load(path)

    survive(case, min(count, 20))
