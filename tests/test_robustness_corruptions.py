"""`cossl robustness` on corrupted pictures: made on the fly, and those of ImageNet-C."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from robust_run import Independent, alike, ask, copied, found, judge_of, percent, trained
from torch import Tensor

from cossl.models.probe import fit_probe
from cossl.pipelines.augment import normalize
from cossl.pipelines.corruptions import corrupt
from cossl.tools.robustness_judge import Hits


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alike(pictures, tmp_path_factory.mktemp("alike"))


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(data, tmp_path_factory.mktemp("robust"))


@pytest.fixture(scope="module")
def independent(run_dir: Path, data: Path) -> Independent:
    return Independent(run_dir, data)


def test_corruptions_are_asked_of_the_same_pictures(run_dir: Path) -> None:
    flags = "--corruptions gaussian_noise brightness contrast --severities 1 5 --pictures 20".split()
    ask(run_dir, *flags, families=("corruptions",))
    result = found(run_dir, "corruptions")
    assert result["pictures"] == 20
    assert set(result["top1"]) == {"gaussian_noise", "brightness", "contrast"}
    assert result["protocol"]["severities"] == [1, 5]
    judge, hits = judge_of(run_dir, pictures=20), Hits()
    for some in judge.some(""):
        hits.add("clean", judge.classifier(normalize(some.images)), some.label)
        for name in ("gaussian_noise", "contrast"):
            hits.add(name, judge.classifier(normalize(corrupt(some.images, some.number, name, 5, 0))), some.label)
    assert result["clean_top1"] == pytest.approx(hits.top1("clean"))
    for name in ("gaussian_noise", "contrast"):
        assert result["top1"][name][1] == pytest.approx(hits.top1(name), abs=0.01)
    assert "figures" in result


def published(data: Path, root: Path, px: int) -> Iterator[tuple[Tensor, str]]:
    """Writes one picture of four classes at every severity of contrast; each as it is read again, with its class."""
    for severity in range(1, 6):
        for source in [next(folder.iterdir()) for folder in sorted((data / "val").iterdir())[::3]]:
            folder = root / "contrast" / str(severity) / source.parent.name
            folder.mkdir(parents=True)
            with Image.open(source) as picture:
                pixels = picture.convert("RGB").resize((px, px))
            pixels.save(folder / "one.JPEG", quality=90)
            with Image.open(folder / "one.JPEG") as stored:
                yield torch.from_numpy(np.array(stored)).permute(2, 0, 1)[None], source.parent.name


def test_the_published_pictures_are_asked_about_as_they_are(run_dir: Path, independent: Independent, data: Path, tmp_path: Path) -> None:
    """By a head fitted at their size, though the run's own is 32 px; the head of that size is kept."""
    copy, names, right = copied(run_dir, tmp_path / "copy"), judge_of(run_dir).class_names, []
    ((_, x, label),) = independent.batches("train", 224)
    probe = fit_probe(independent.encoder(x)[0], label)
    for images, name in published(data, tmp_path / "c", 224):
        right.append(probe.logits(independent.encoder(normalize(images))[0]).argmax().item() == names.index(name))
    ask(copy, "--imagenet-c", str(tmp_path / "c"), families=("imagenet-c", "internal"))
    ask(run_dir, families=("internal",))
    result = found(copy, "imagenet-c")
    assert result["mean_top1"] == pytest.approx(100 * np.mean(right), abs=0.01)
    assert (result["protocol"]["px"], result["protocol"]["view"]) == (224, "the whole picture as published, 224 px")
    assert (result["protocol"]["probe"]["px"], result["protocol"]["probe"]["centre_frac"]) == (224, 0.875)
    assert found(copy, "internal") | {"time": ""} == found(run_dir, "internal") | {"time": "", "run": "copy"}
    assert {path.name for path in (copy / "robustness").glob("*.pt")} == {"probe.pt", "probe-224px.pt"}


def test_another_size_is_that_of_all_families(run_dir: Path, independent: Independent, tmp_path: Path) -> None:
    copy = copied(run_dir, tmp_path / "copy")
    ask(copy, "--px", "48", families=("internal",))
    ((_, x, label),) = independent.batches("train", 48)
    probe = fit_probe(independent.encoder(x)[0], label)
    assert found(copy, "internal")["clean_top1"] == pytest.approx(percent(probe.logits(independent.encoder(x)[0]), label), abs=0.01)
    assert (found(copy, "internal")["protocol"]["px"], found(copy, "internal")["protocol"]["probe"]["px"]) == (48, 48)


def test_the_published_pictures_are_resized_whole_where_a_size_is_given(run_dir: Path, data: Path, tmp_path: Path) -> None:
    judge, hits = judge_of(run_dir), Hits()
    for images, name in published(data, tmp_path, 32):
        hits.add("all", judge.classifier(normalize(images)), torch.tensor([judge.class_names.index(name)]))
    with pytest.raises(ValueError, match=r"one\.JPEG: 32 x 32 px, the published ones have 224: --px N"):
        ask(run_dir, "--imagenet-c", str(tmp_path), families=("imagenet-c",))
    ask(run_dir, "--imagenet-c", str(tmp_path), "--px", "32", families=("internal",))
    result = found(run_dir, "imagenet-c")
    assert result["pictures"] == 20
    assert (result["protocol"]["px"], result["protocol"]["view"]) == (32, "the whole picture resized to 32 px")
    assert result["mean_top1"] == pytest.approx(hits.top1("all"))
    assert (result["protocol"]["split"], result["protocol"]["imagenet_c"]) == ("ImageNet-C", str(tmp_path))
