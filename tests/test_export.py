"""What `cossl export` writes is the run's own encoder, in every format; what cannot be written is said in one line."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
import torchvision
from saved_runs import DEMO, NETWORKS, run_of
from torch import Tensor

import cossl
from cossl.models.load import Encoder
from cossl.models.rf_resnet import ResNet, bagnet, rf_resnet50
from cossl.tools.export import export, export_main, plain
from cossl.tools.opened import open_run

PX = 40
_LONG = [
    pytest.param("rf_resnet50 of 8 channels", True, marks=pytest.mark.long),
    pytest.param("resnet50", False, marks=pytest.mark.long),
]
WIDE = [name for name, config in NETWORKS.items() if config.model.width == 64]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: run_of(config, tmp_path_factory.mktemp("runs") / name) for name, config in NETWORKS.items()}


def exported(run: Path, *formats: Any, **options: Any) -> tuple[Encoder, Path, dict[str, str]]:
    opened = open_run(run, "cpu")
    _, left_out = export(opened, run / "export", formats, px=PX, **options)
    return opened.encoder, run / "export", left_out


def pictures(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, PX, PX, generator=torch.Generator().manual_seed(0))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 1e-3  # not the same for all pictures and channels
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ------------------------------------------------------------------------------------------------- each format read again


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_safetensors_come_back_as_the_encoder(runs: dict[str, Path], name: str, heads: bool) -> None:
    encoder, out, left_out = exported(runs[name], "safetensors", heads=heads)
    again = cossl.load(out)
    assert not left_out
    assert again.step == encoder.step == 7
    assert again.config["px"] == PX
    for ours, theirs in zip(again(pictures()), encoder(pictures()), strict=True):
        assert_close(ours, theirs)
    assert (again.network.projector is not None) == (again.network.predictors is not None) == heads
    if heads:
        Y = encoder.represent(pictures())
        assert_close(again.network.projector.vectors(Y), encoder.network.projector.vectors(Y))
        assert set(again.state_dict()) == set(encoder.state_dict())


def theirs_of(build: Any, out: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """Their network after the lines that the file beside the state lists."""
    said = json.loads((out / f"{name}.json").read_text())
    model = build()
    for line in said["changes_before_loading"]:
        exec(line, {"model": model, "torch": torch})
    return model.eval(), said


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_torchvision_and_timm_compute_the_same_map(runs: dict[str, Path], name: str, to: str) -> None:
    encoder, out, left_out = exported(runs[name], "torchvision", "timm")
    assert not left_out
    family = "resnet50" if "50" in name else "resnet18"
    if to == "torchvision":
        model, _ = theirs_of(getattr(torchvision.models, family), out, family)
        missing, unknown = model.load_state_dict(torch.load(out / f"{family}.pth", weights_only=True), strict=False)
        assert (missing, unknown) == (["fc.weight", "fc.bias"], [])
        model.fc = torch.nn.Identity()
    else:
        model, _ = theirs_of(lambda: timm.create_model(family, num_classes=0), out, family)
        timm.models.load_checkpoint(model, str(out / f"{family}.timm.safetensors"), strict=True)
    with torch.no_grad():
        assert_close(model(pictures()), encoder(pictures())[1].mean((2, 3)))


def test_what_has_to_be_changed_first_is_told(runs: dict[str, Path]) -> None:
    _, out, _ = exported(runs["resnet50"], "torchvision")
    assert json.loads((out / "resnet50.json").read_text())["changes_before_loading"] == []
    _, out, _ = exported(runs["rf_resnet50 of 64 channels"], "torchvision")
    said = json.loads((out / "resnet50.json").read_text())
    assert said["narrowed_to_1x1"] == [f"layer{stage}.{i}.conv2" for stage, depth in ((3, 6), (4, 3)) for i in range(depth)]
    assert said["changes_before_loading"][:2] == ["model.layer2[0].conv1.stride = (2, 2)", "model.layer2[0].conv2.stride = (1, 1)"]
    assert "MLP" in said["left_out"][0]
    _, out, _ = exported(runs["rf_resnet18 of 64 channels"], "torchvision")
    assert "conv1" in json.loads((out / "resnet18.json").read_text())["changes_before_loading"][0]


@pytest.mark.parametrize(("name", "backbone"), [("rf_resnet50", rf_resnet50(35)), ("bagnet", bagnet(17))])
def test_a_1x1_in_the_middle_of_zeros_is_the_same_function(name: str, backbone: ResNet) -> None:
    ours, model = plain(backbone, name), torchvision.models.resnet50()
    for line in ours.changes:
        exec(line, {"model": model, "torch": torch})
    assert model.load_state_dict(ours.state, strict=False) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    with torch.no_grad():
        assert_close(model.eval()(pictures(2)), backbone.eval()(pictures(2)).mean((2, 3)))


@pytest.mark.parametrize(("name", "heads"), [("demo", True), ("resnet18", False), *_LONG])
def test_onnx_runs_elsewhere_on_any_number_of_pictures(runs: dict[str, Path], name: str, heads: bool) -> None:
    encoder, out, left_out = exported(runs[name], "onnx", heads=heads)
    assert not left_out
    session = onnxruntime.InferenceSession(out / "backbone.onnx", providers=["CPUExecutionProvider"])
    outputs = ["global", "local", "global_projected", "local_projected"][: 4 if heads else 2]
    assert [output.name for output in session.get_outputs()] == outputs
    assert session.get_modelmeta().custom_metadata_map["px"] == str(PX)
    assert str(Path(torch.__file__).parent).encode() not in (out / "backbone.onnx").read_bytes()
    for batch in (1, 5):
        found = [torch.from_numpy(value) for value in session.run(None, {"x": pictures(batch).numpy()})]
        Y, y = encoder(pictures(batch))
        expected = [Y, y]
        if heads:
            every = torch.arange(y.shape[-1] ** 2).expand(batch, -1)
            local = encoder.network.local_projector(y, every)
            expected += [encoder.network.projector.vectors(Y), local.transpose(1, 2).unflatten(2, y.shape[2:])]
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------- what is left out, and how it is written


def test_a_format_that_cannot_be_is_one_line_and_the_others_are_written(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    export_main([str(runs["demo"]), "--out", str(tmp_path / "new" / "folder")])
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {"backbone.safetensors", "config.json"}
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": left out, ")[1] for line in said if ": left out, " in line] == [
        "resnet18 is 64 wide, this backbone 16",
        "resnet18 is 64 wide, this backbone 16",
        "onnxscript is not installed: pip install -c constraints.txt -e '.[export]'",
    ]
    with pytest.raises(ValueError, match=r"^nothing was written$"):
        export_main([str(runs["demo"]), "--formats", "timm", "onnx"])


def test_no_run_and_no_file_is_written_over(runs: dict[str, Path], tmp_path: Path) -> None:
    before = (runs["demo"] / "config.json").read_bytes()
    with pytest.raises(ValueError, match=f"^--out {runs['demo']} is a run's folder, whose config.json would be replaced: give another$"):
        export_main([str(runs["demo"]), "--out", str(runs["demo"])])
    assert (runs["demo"] / "config.json").read_bytes() == before
    begun = tmp_path / "begun"  # has no checkpoint yet
    begun.mkdir()
    (begun / "config.json").write_bytes(before)
    with pytest.raises(ValueError, match=f"^--out {begun} is a run's folder, "):
        export_main([str(runs["demo"]), "--out", str(begun)])
    (file := tmp_path / "file").touch()
    for out in (file, file / "below"):
        with pytest.raises(ValueError, match=f"^--out {out}: {file} is a file, give a folder$"):
            export_main([str(runs["demo"]), "--out", str(out)])
    for _ in range(2):
        export_main([str(runs["demo"]), "--out", str(tmp_path / "again"), "--formats", "safetensors"])


@pytest.mark.parametrize(("flags", "said"), [(["--px", "4"], "--px 4"), (["--checkpoint", "epoch-0003.pt"], "does not exist")])
def test_mistakes_are_one_line(runs: dict[str, Path], flags: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        export_main([str(runs["demo"]), *flags])
    assert "\n" not in str(caught.value)


def test_a_failing_export_leaves_the_one_before(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(runs["demo"], "cpu")
    export(run, tmp_path, ["safetensors"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        export(run, tmp_path, ["safetensors"], heads=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_export_killed_between_its_two_files_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    export(open_run(runs["demo"], "cpu"), tmp_path, ["safetensors"])
    config = (tmp_path / "config.json").read_bytes()
    export(open_run(runs["demo"], "cpu"), tmp_path, ["safetensors"], heads=True)
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(ValueError, match=r"backbone\.safetensors is not the one .*: export the run again$"):
        cossl.load(tmp_path)


def test_shared_heads_are_exported_under_both_names(tmp_path: Path) -> None:
    shared = replace(DEMO, model=replace(DEMO.model, shared_heads=True))
    encoder, out, _ = exported(run_of(shared, tmp_path / "run"), "safetensors", heads=True)
    again = cossl.load(out)
    assert again.network.local_projector is again.network.projector
    Y = encoder.represent(pictures())
    assert_close(again.network.projector.vectors(Y), encoder.network.projector.vectors(Y))
