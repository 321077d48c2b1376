"""Accuracy under corruptions: on the fly and of the published layout, from folders and tars, the mean corruption error, the figure."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cossl.pipelines import imagenet_c
from cossl.pipelines.augment import normalize
from cossl.pipelines.corruptions import EXTRA, NAMES, SEVERITIES, corrupt
from cossl.pipelines.imagenet_c import Published
from cossl.tools import corruptions
from cossl.tools.corruptions import (
    ALEXNET_ERROR,
    corruption_table,
    draw_corruptions,
    evaluate_corruptions,
    evaluate_imagenet_c,
    mean_corruption_error,
    summary,
)

CPU = torch.device("cpu")
CLASSES = ("n03", "n01")  # in the head's order, which is not the alphabet's


def by_brightness(normalized: torch.Tensor) -> torch.Tensor:
    """Class 1 for pictures lighter than a middle grey."""
    light = normalized.mean((1, 2, 3))
    return torch.stack([-light, light], 1)


PX = 40


@cache
def jpeg(level: int, size: tuple[int, int] = (PX, PX)) -> bytes:
    memory = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(memory, "JPEG")
    return memory.getvalue()


def layout(names: tuple[str, ...] = NAMES, severities: tuple[int, ...] = SEVERITIES) -> dict[str, bytes]:
    """Dark pictures of n03, light ones of n01; at severity s the first s of five pictures of n01 are dark and so taken for n03's."""
    files = {}
    for name in names:
        for s in severities:
            for i in range(5):
                files[f"{name}/{s}/n03/{i}.JPEG"] = jpeg(20)
                files[f"{name}/{s}/n01/{i}.JPEG"] = jpeg(20 if i < s else 230)
                files[f"{name}/{s}/n02/{i}.JPEG"] = jpeg(128)  # a class that the head does not know
    return files


@pytest.fixture
def two_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ImageNet had two classes."""
    monkeypatch.setattr(corruptions, "ALEXNET_CLASSES", len(CLASSES))


def in_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def in_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize(("severities", "comparable"), [((1, 2, 3, 4, 5), True), ((5, 4, 3, 2, 1), True), ((3, 3, 3, 3, 3), False)])
def test_a_corruption_error_is_of_all_five_severities(severities: tuple[int, ...], comparable: bool) -> None:
    found = summary({"snow": [50.0] * 5}, severities, 70.0, {}, 10, 1000)
    assert (found["mean_corruption_error"] is not None) == comparable


def test_mean_corruption_error() -> None:
    errors = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5], "pixelate": [0.7] * 5}
    assert mean_corruption_error(errors) == pytest.approx(100 * (1.5 / (5 * 0.819324) + 0.7 / 0.717840) / 2)
    assert mean_corruption_error({name: [error] * 5 for name, error in ALEXNET_ERROR.items()}) == pytest.approx(100)
    assert tuple(ALEXNET_ERROR) == NAMES
    for wrong, what in (({}, "at all five"), ({"fog": [0.1] * 4}, "fog at 4"), ({"spatter": [0.1] * 5}, "spatter")):
        with pytest.raises(ValueError, match=what):
            mean_corruption_error(wrong)


def test_on_the_fly_counts_what_a_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(60, 180, (6, 3, 1, 1), dtype=np.uint8)).expand(6, 3, 40, 40).contiguous()
    labels = by_brightness(normalize(images)).argmax(1)
    labels[0] = 1 - labels[0]
    index = torch.tensor([4, 8, 1, 0, 9, 30])
    batches = [(images[part], normalize(images[part]), labels[part], index[part]) for part in (slice(0, 4), slice(4, 6))]
    names = ("fog", "frost", "brightness", "saturate")
    result = evaluate_corruptions(by_brightness, batches, names, (1, 4), 2, CPU)
    assert result["clean_top1"] == pytest.approx(100 * 5 / 6)
    for name in ("fog", "brightness", "saturate"):
        for column, severity in enumerate((1, 4)):
            corrupted = torch.cat([corrupt(images[i : i + 1], index[i : i + 1], name, severity, 2) for i in range(6)])
            right = (by_brightness(normalize(corrupted)).argmax(1) == labels).double().mean().item()
            assert result["top1"][name][column] == pytest.approx(100 * right)
    assert result["top1"]["frost"] == [None, None]
    assert "--frost-dir" in result["missing"]["frost"]
    counted = [*result["top1"]["fog"], *result["top1"]["brightness"]]
    assert (result["mean_top1"], result["mean_top1_over"]) == (pytest.approx(np.mean(counted)), 4)
    assert (result["mean_corruption_error"], result["mean_corruption_error_over"]) == (None, 0)
    assert json.loads(json.dumps(result)) == result
    frost = [random.integers(0, 256, (60, 70, 3), dtype=np.uint8)]
    assert evaluate_corruptions(by_brightness, batches, names, (1,), 2, CPU, frost)["missing"] == {}


def test_without_an_index_pictures_are_numbered_as_they_come() -> None:
    images = torch.full((3, 3, 40, 40), 128, dtype=torch.uint8)
    seen: list[torch.Tensor] = []

    def predict(normalized: torch.Tensor) -> torch.Tensor:
        seen.append(normalized)
        return torch.eye(2)[torch.zeros(len(normalized), dtype=torch.int64)]

    batches = [(part, normalize(part), torch.zeros(len(part), dtype=torch.int64)) for part in images.split(2)]
    evaluate_corruptions(predict, batches, ["gaussian_noise"], [1], 0, CPU)
    wanted = normalize(corrupt(images, torch.arange(3), "gaussian_noise", 1, 0))
    assert torch.equal(torch.cat([seen[1], seen[3]]), wanted)


def test_mistakes_on_the_fly() -> None:
    for names, severities, what in ((["haze"], [1], "haze"), (["fog"], [6], "severities 6"), (["fog"], [], "expected some")):
        with pytest.raises(ValueError, match=what):
            evaluate_corruptions(by_brightness, [], names, severities, 0, CPU)
    with pytest.raises(ValueError, match="no pictures"):
        evaluate_corruptions(by_brightness, [], ["fog"], [1], 0, CPU)


@pytest.mark.parametrize("kind", ["folders", "folders of folders", "one tar", "tars", "a tar and folders"])
@pytest.mark.usefixtures("two_are_all")
def test_the_published_layout(kind: str, tmp_path: Path) -> None:
    files = layout()
    noise = {name: data for name, data in files.items() if "noise" in name}
    rest = {name: data for name, data in files.items() if name not in noise}
    root = {
        "folders": lambda: in_folder(tmp_path, files),
        "folders of folders": lambda: in_folder(tmp_path / "noise", noise).parent and in_folder(tmp_path / "rest", rest).parent,
        "one tar": lambda: in_tar(tmp_path / "all.tar", files),
        "tars": lambda: (
            in_tar(tmp_path / "a.tar", noise).parent and in_tar(tmp_path / "b.tar", {f"./x/{k}": v for k, v in files.items()}).parent
        ),
        "a tar and folders": lambda: in_folder(tmp_path, rest) and in_tar(tmp_path / "all.tar", files).parent,
    }[kind]()
    result = evaluate_imagenet_c(by_brightness, root, PX, CLASSES, CPU)
    assert result["top1"] == {name: [100 * (10 - s) / 10 for s in SEVERITIES] for name in NAMES}
    assert (result["mean_top1"], result["mean_top1_over"], result["missing"]) == (pytest.approx(70), 75, {})
    assert result["mean_corruption_error"] == pytest.approx(100 * np.mean([0.3 / error for error in ALEXNET_ERROR.values()]))
    assert (result["classes"], result["classes_found"], result["class_folders"], result["pictures"]) == (2, 2, 3, 750)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.usefixtures("two_are_all")
def test_what_is_missing_is_said(tmp_path: Path) -> None:
    files = layout(("fog", "snow", "spatter"))
    for name in [name for name in files if name.startswith("snow/2/")]:
        del files[name]
    del files["fog/3/n01/0.JPEG"]
    result = evaluate_imagenet_c(by_brightness, in_folder(tmp_path, files), PX, CLASSES, CPU)
    assert result["missing"]["snow"] == "no pictures at severity 2"
    assert result["missing"]["fog"] == "severity 3 has 9 of 10 pictures"
    assert result["missing"]["frost"] == "no pictures at severity 1 2 3 4 5"
    assert set(result["missing"]) == set(NAMES)
    assert (result["mean_top1_over"], result["mean_corruption_error_over"]) == (9, 1)
    assert [name for name in result["top1"] if name not in NAMES] == ["spatter"]
    table = corruption_table(result)
    rows = {row[0]: row for row in table["rows"]}
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert rows["snow"][2:] == [90, "missing", 70, 60, 50, 67.5, "missing"]
    assert rows["spatter"][1:3] == ["extra", 90]
    assert table["rows"][-1][0] == "mean of 9 numbers, of mCE 1 of 15"


def test_no_corruption_error_of_other_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AlexNet's errors are of all of ImageNet's: neither of a head for fewer, nor of a set that lacks some."""
    root = in_folder(tmp_path, layout(("fog",)))
    result = evaluate_imagenet_c(by_brightness, root, PX, CLASSES, CPU)
    assert (result["mean_corruption_error"], result["mean_corruption_error_over"]) == (None, 0)
    table = corruption_table(result)
    assert table["columns"][-1] == "mean"
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    monkeypatch.setattr(corruptions, "ALEXNET_CLASSES", 3)
    assert evaluate_imagenet_c(by_brightness, root, PX, (*CLASSES, "n04"), CPU)["mean_corruption_error"] is None
    monkeypatch.setattr(corruptions, "ALEXNET_CLASSES", 2)
    assert evaluate_imagenet_c(by_brightness, root, PX, CLASSES, CPU)["mean_corruption_error"] == pytest.approx(100 * 0.3 / 0.819324)
    image = torch.full((2, 3, 40, 40), 128, dtype=torch.uint8)
    batches = [(image, normalize(image), torch.tensor([0, 1]))]
    result = evaluate_corruptions(by_brightness, batches, ["fog"], SEVERITIES, 0, CPU)
    assert result["mean_corruption_error_over"] == 1


def random_picture(folder: Path, size: tuple[int, int]) -> Image.Image:
    """The picture that then is all of the set."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    memory = io.BytesIO()
    picture.save(memory, "PNG")
    in_folder(folder, {"fog/1/n01/a.png": memory.getvalue()})
    return picture


def test_a_picture_is_asked_about_whole_as_published(tmp_path: Path) -> None:
    """torchvision's CenterCrop(224) of it, bit for bit."""
    from torchvision.transforms import CenterCrop

    picture = random_picture(tmp_path, (224, 224))
    (batch,) = Published(tmp_path, CLASSES).batches(4)
    assert torch.equal(batch.images[0], torch.from_numpy(np.array(CenterCrop(224)(picture))).permute(2, 0, 1))
    assert (batch.corruption, batch.severity, batch.label.tolist()) == (("fog",), (1,), [1])


@pytest.mark.parametrize("px", [32, 64, 67, 90])
def test_a_picture_is_resized_whole(px: int, tmp_path: Path) -> None:
    """As the loaders resize: antialiased bilinear, and not at all where it has the size."""
    picture = random_picture(tmp_path, (67, 67))
    (batch,) = Published(tmp_path, CLASSES).batches(4, px)
    assert batch.images.shape == (1, 3, px, px)
    wanted = picture.resize((px, px), Image.Resampling.BILINEAR)
    assert torch.equal(batch.images[0], torch.from_numpy(np.array(wanted)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("size", "px", "said"),
    [
        ((67, 67), 0, r"a\.png: 67 x 67 px, the published ones have 224: --px N resizes the whole square to N px$"),
        ((256, 256), 0, "256 x 256 px, the published ones have 224"),
        ((224, 200), 0, "224 x 200 px: the pictures of ImageNet-C are squares"),
        ((90, 67), 64, "90 x 67 px: the pictures of ImageNet-C are squares"),
    ],
)
def test_no_picture_is_cut(size: tuple[int, int], px: int, said: str, tmp_path: Path) -> None:
    random_picture(tmp_path, size)
    with pytest.raises(ValueError, match=said):
        list(Published(tmp_path, CLASSES).batches(4, px))


def hostile(add: Callable[[tarfile.TarFile], None], path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        good = jpeg(20)
        add(archive)
        member = tarfile.TarInfo("fog/1/n03/good.JPEG")
        member.size = len(good)
        archive.addfile(member, io.BytesIO(good))
    return path


def of_kind(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> Callable[[tarfile.TarFile], None]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return lambda archive: archive.addfile(member, io.BytesIO(bytes(size)))


PASSED_OVER = {
    "link": of_kind("fog/1/n03/a.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": of_kind("fog/1/n03/a.JPEG", tarfile.LNKTYPE, "fog/1/n03/good.JPEG"),
    "device": of_kind("fog/1/n03/a.JPEG", tarfile.CHRTYPE),
    "absolute": of_kind("/fog/1/n03/a.JPEG", size=10),
    "upwards": of_kind("../fog/1/n03/a.JPEG", size=10),
    "upwards within": of_kind("fog/1/../n03/a.JPEG", size=10),
    "severity": of_kind("fog/9/n03/a.JPEG", size=10),
    "no picture": of_kind("fog/1/n03/a.txt", size=10),
    "another class": of_kind("fog/1/n99/a.JPEG", size=10),
}


@pytest.mark.parametrize("what", PASSED_OVER)
def test_members_of_a_tar_that_are_passed_over(what: str, tmp_path: Path) -> None:
    root = hostile(PASSED_OVER[what], tmp_path / "a.tar")
    assert [one.where for one in Published(root, CLASSES).stored()] == [f"{root}: fog/1/n03/good.JPEG"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]  # nothing was unpacked


def test_sizes_are_bounded_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagenet_c, "LARGEST_BYTES", 20_000)
    monkeypatch.setattr(imagenet_c, "LARGEST_PIXELS", 300 * 300)
    with pytest.raises(ValueError, match="30,000 bytes"):
        list(Published(hostile(of_kind("fog/1/n03/a.JPEG", size=30_000), tmp_path / "a.tar"), CLASSES).stored())
    with pytest.raises(ValueError, match="no whole tar: a header asks for"):
        list(Published(hostile(of_kind("x", tarfile.GNUTYPE_LONGNAME, size=30_000), tmp_path / "b.tar"), CLASSES).stored())
    with pytest.raises(ValueError, match="30,000 bytes"):
        list(Published(in_folder(tmp_path / "c", {"fog/1/n03/a.JPEG": bytes(30_000)}), CLASSES).stored())
    with pytest.raises(ValueError, match="301 x 301 pixels"):
        list(Published(in_folder(tmp_path / "d", {"fog/1/n03/a.JPEG": jpeg(5, (301, 301))}), CLASSES).batches(4, PX))


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    whole = in_tar(tmp_path / "a.tar", layout(("fog",), (1,))).read_bytes()
    second = 512 + -(-len(jpeg(20)) // 512) * 512  # where its second member begins
    for data in (whole[:700], whole[:second], whole[: second + 200], whole[:second] + b"?" * 512 + whole[second + 512 :], b""):
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar is no whole tar") as told:
            list(Published(tmp_path / "a.tar", CLASSES).stored())
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="no whole tar"):
        list(Published(in_folder(tmp_path, {"b.tar": b"no tar at all" * 100}) / "b.tar", CLASSES).stored())
    bad = in_folder(tmp_path / "c", {"fog/1/n03/a.JPEG": jpeg(20)[:300]})
    with pytest.raises(ValueError, match=r"cannot use .*a\.JPEG"):
        evaluate_imagenet_c(by_brightness, bad, PX, CLASSES, CPU)
    with pytest.raises(ValueError, match="holds none of ImageNet-C"):
        Published(tmp_path / "nowhere", CLASSES)
    with pytest.raises(ValueError, match=r"head knows cat, dog.*found are n01, n02, n03"):
        evaluate_imagenet_c(by_brightness, in_folder(tmp_path / "d", layout(("fog",), (1,))), PX, ("cat", "dog"), CPU)


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = {"severities": [1, 3, 5], "clean_top1": 80.0, "top1": {name: [70.0, 50.0, 30.0] for name in (*NAMES, *EXTRA)}}
    other = result | {"clean_top1": None, "top1": result["top1"] | {"frost": [None] * 3}}
    draw_corruptions({"a_$run$": result, "b": other}, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as figure:
        assert figure.size[0] > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_corruptions({"a": other | {"top1": {"frost": [None] * 3}}}, tmp_path / "d.png")
