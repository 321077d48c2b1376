"""The demo set: the same bytes for a seed, classes that are pairs of part types, nothing half-done, colours that tell nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cossl.pipelines import demo_set

SMALL = (20, 10)


def digest(root: Path) -> str:
    """One hash of every file's relative name and bytes."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.jpg")):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_the_seed_gives_the_bytes(tmp_path: Path) -> None:
    first = digest(demo_set.make_demo_set(tmp_path / "a", count=SMALL))
    assert digest(demo_set.make_demo_set(tmp_path / "b", count=SMALL)) == first
    assert digest(demo_set.make_demo_set(tmp_path / "a", seed=1, count=SMALL)) != first


def test_a_picture_depends_on_its_index_alone() -> None:
    alone = demo_set.picture(0, 0, 7)
    after_others = [demo_set.picture(0, 0, i) for i in range(8)][7]
    assert np.array_equal(alone, after_others)
    assert not np.array_equal(alone[:64, :64], demo_set.picture(0, 1, 7)[:64, :64])


def test_tree_is_an_image_folder(tmp_path: Path) -> None:
    root = demo_set.make_demo_set(tmp_path, count=SMALL)
    for split, count in zip(("train", "val"), SMALL, strict=True):
        folders = sorted(p.name for p in (root / split).iterdir())
        assert folders == demo_set.class_names()
        assert [len(list((root / split / f).iterdir())) for f in folders] == [count // 10] * 10
    sizes = set()
    for path in root.rglob("*.jpg"):
        with Image.open(path) as stored:
            sizes.add(stored.size)
    assert all(demo_set.SIDE_PX[0] <= side <= demo_set.SIDE_PX[1] for size in sizes for side in size)
    assert any(w != h for w, h in sizes)


def test_classes_are_the_pairs_of_five_part_types() -> None:
    pairs = [name.split("-") for name in demo_set.class_names()]
    assert len({frozenset(pair) for pair in pairs}) == 10
    assert all(len(set(pair)) == 2 for pair in pairs)
    assert set(Counter(part for pair in pairs for part in pair).values()) == {4}


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo_set.picture

    def breaks(seed: int, split: int, index: int) -> np.ndarray:
        if split == 1 and index == 3:
            raise KeyboardInterrupt
        return real(seed, split, index)

    monkeypatch.setattr(demo_set, "picture", breaks)
    with pytest.raises(KeyboardInterrupt):
        demo_set.make_demo_set(tmp_path, count=SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(demo_set, "picture", real)
    assert len(list(demo_set.make_demo_set(tmp_path, count=SMALL).rglob("*.jpg"))) == sum(SMALL)


def test_second_call_does_not_regenerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = demo_set.make_demo_set(tmp_path, count=SMALL)

    def never(*_: int) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr(demo_set, "picture", never)
    assert demo_set.make_demo_set(tmp_path, count=SMALL) == root


def test_the_slower_of_two_processes_takes_the_faster_ones_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = demo_set.picture
    won: list[Path] = []

    def overtaken(seed: int, split: int, index: int) -> np.ndarray:
        if (split, index) == (1, 9):
            monkeypatch.setattr(demo_set, "picture", real)
            won.append(demo_set.make_demo_set(tmp_path, count=SMALL))
        return real(seed, split, index)

    monkeypatch.setattr(demo_set, "picture", overtaken)
    assert demo_set.make_demo_set(tmp_path, count=SMALL) == won[0]
    assert list(tmp_path.iterdir()) == won
    assert len(list(won[0].rglob("*.jpg"))) == sum(SMALL)


def test_old_leftovers_are_swept_and_young_ones_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    young = tmp_path / ".demo-v1-x.1.part"
    young.mkdir()
    demo_set.make_demo_set(tmp_path, count=SMALL)
    assert young.is_dir()
    monkeypatch.setattr(demo_set, "STALE_S", -1.0)
    demo_set.make_demo_set(tmp_path, seed=1, count=SMALL)
    assert not young.exists()


@pytest.mark.parametrize(("seed", "count"), [(-1, SMALL), (0, (0, 10)), (0, (25, 10))])
def test_bad_arguments_are_named(tmp_path: Path, seed: int, count: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="demo set: seed"):
        demo_set.make_demo_set(tmp_path, seed=seed, count=count)
    assert list(tmp_path.iterdir()) == []


def test_colours_and_sizes_do_not_tell_the_class() -> None:
    """F statistics (9 and 190 degrees of freedom) of mean colour and size between classes stay within chance."""
    rows = []
    for index in range(200):
        pixels = demo_set.picture(0, 0, index).astype(np.float64) / 255.0
        rows.append([*pixels.mean((0, 1)), *pixels.shape[:2]])
    table = np.array(rows).reshape(20, 10, -1)
    between = 20 * table.mean(0).var(0, ddof=1)
    within = table.var(0, ddof=1).mean(0)
    assert np.all(between / within < 5.0), between / within
