"""A run is opened from its folder, a checkpoint or an export, and what is damaged or of another kind is refused in one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from saved_runs import DEMO, config_of, network_of, run_of

import cossl
from cossl.models import checkpoint
from cossl.models.flags import flatten, read_object, sealed, unflatten, unsealed
from cossl.models.load import HEADS
from cossl.tools.export import export
from cossl.tools.opened import open_run
from cossl.train import PRESETS, Config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = run_of(DEMO, tmp_path_factory.mktemp("runs") / "demo")
    export(open_run(run, "cpu"), run / "export", ["safetensors"])
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------- what is loaded


def test_pictures_that_are_not_normalized_are_one_line(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^pictures of torch.uint8: give them normalized, cossl.pipelines.augment.normalize\(x\)$"):
        cossl.load(run)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_digest_tells_weights(run: Path) -> None:
    encoder, again = cossl.load(run), cossl.load(run / "export")
    assert len(encoder.digest()) == 16
    assert encoder.source == "last.pt"
    before = encoder.digest()
    assert cossl.load(run / "last.pt").digest() == before
    assert again.digest() != before  # it lacks the heads
    encoder.network.backbone.state_dict()["conv1.weight"][0, 0, 0, 0] += 1
    assert encoder.digest() != before


def test_folder_checkpoint_and_export_give_the_online_network_in_eval_mode(run: Path) -> None:
    model = network_of(DEMO).eval()
    with torch.no_grad():
        y = model.online.backbone(pictures())
        Y = model.represent(pictures())
    for path in (run, run / "last.pt", run / "export", str(run)):
        encoder = cossl.load(path)
        assert encoder.step == 7
        assert not any(p.requires_grad for p in encoder.parameters())
        for ours, theirs in zip(encoder(pictures()), (Y, y), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_train_leaves_it_in_eval_mode(run: Path) -> None:
    encoder = cossl.load(run)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    encoder(pictures())
    assert not any(module.training for module in encoder.modules())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "dino", "prototypes": 32, "head_norm": "none"},
        {"method": "mocov3"},
        {"shared_heads": True},
        {"local_head": "mlp2", "local_stage": 3, "mlp_after_pool": 2},
    ],
)
@pytest.mark.parametrize("local_weight", [0.3, 0.0])
def test_every_kind_of_run_is_loaded(tmp_path: Path, changes: dict[str, Any], local_weight: float) -> None:
    config = config_of(replace(DEMO.model, **changes))
    config = replace(config, loss=replace(config.loss, local_weight=local_weight))
    run = run_of(config, tmp_path / "run")
    with torch.no_grad():
        expected = network_of(config).eval().represent(pictures())
    encoder = open_run(run, "cpu").encoder
    torch.testing.assert_close(encoder.represent(pictures()), expected, rtol=1e-5, atol=1e-6)
    assert (encoder.network.local_projector is not None) == (local_weight > 0)


@pytest.mark.parametrize("small_views", [True, False])
def test_predictors_of_small_views_are_loaded_where_there_are_any(tmp_path: Path, small_views: bool) -> None:
    """Without small views in the local terms the local predictor is one, though predictors are per size."""
    config = replace(
        DEMO,
        model=replace(DEMO.model, predictors="per_size"),
        loss=replace(DEMO.loss, small_views=small_views),
        views=replace(DEMO.views, recipe="multi_crop", crop_min=0.14),
    )
    encoder = cossl.load(run_of(config, tmp_path / "run"))
    assert encoder.network.local_predictors is not None
    assert (len(encoder.network.predictors), len(encoder.network.local_predictors)) == (2, 1 + small_views)


def test_the_import_is_light_and_load_is_found() -> None:
    code = "import sys, cossl; assert 'torch' not in sys.modules; print(cossl.load.__module__); assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cossl.models.load\n", "")


# ------------------------------------------------------------------------------------------------- what is refused


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    state = checkpoint.load(path)
    change(state)
    checkpoint.write(path, state)


def pop_weight(state: dict[str, Any]) -> None:
    state["model"].pop("online.backbone.bn1.weight")


def pop_head(state: dict[str, Any]) -> None:
    for key in [key for key in state["model"] if key.startswith("online.predictors.")]:
        del state["model"][key]


def repeat_a_number(state: dict[str, Any]) -> None:
    state["model"]["online.backbone.bn1.weight"] = torch.ones(1).expand(1 << 40)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no config": (lambda state: state.pop("config"), "is no checkpoint of a run"),
    "a number for a key": (lambda state: state["config"].update({3: 4}), "is no checkpoint of a run"),
    "a list for a weight": (lambda state: state["model"].update({"online.backbone.bn1.weight": [1.0]}), "is no whole tensor"),
    "a number that is a terabyte": (repeat_a_number, "is no whole tensor"),
    "a weight less": (pop_weight, r"'backbone\.bn1\.weight' is missing"),
    "a head less": (pop_head, r"'predictors\.0\.[\w.]+' is missing"),
    "a weight more": (lambda state: state["model"].update({"online.x": torch.ones(1)}), "'x' is unknown"),
    "another shape": (lambda state: state["model"].update({"online.backbone.bn1.weight": torch.ones(3)}), "size mismatch"),
    "another type": (lambda state: state["model"].update({"online.backbone.bn1.weight": torch.ones(16).half()}), "float16, expected"),
    "another width": (lambda state: state["config"].update({"model.width": 8}), "does not fit its own config"),
    "a width without end": (lambda state: state["config"].update({"model.width": 10**30}), "does not fit its own config"),
    "a head without end": (lambda state: state["config"].update({"model.hidden_dim": 10**30}), "does not fit its own config: empty"),
    "layers without end": (lambda state: state["config"].update({"model.mlp_after_pool": 10**9}), "1000000000 layers"),
    "an unknown setting": (lambda state: state["config"].update({"model.colour": 1}), "'colour' is no setting"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_checkpoint_that_is_none_of_a_run_is_refused(run: Path, kind: str) -> None:
    change, said = REFUSED[kind]
    rewrite(run / "last.pt", change)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(run))}.*{said}") as caught:
        cossl.load(run / "last.pt")
    assert "\n" not in str(caught.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["last.pt", "export/backbone.safetensors", "export/config.json", "config.json"])
def test_a_damaged_file_is_one_line(run: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(run / name)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(run))}") as caught:
        cossl.load(run / "export") if "export" in name else open_run(run, "cpu")
    assert "\n" not in str(caught.value)


def test_a_config_of_another_run_is_refused(run: Path) -> None:
    for key, value, said in [
        ("epochs", 9, "--epochs 9, its checkpoint 8"),
        ("loss.local_weight", None, "expected float"),
        ("preset", "demn", "preset 'demn' is unknown"),
        ("preset", {"demo": 1}, "preset {'demo': 1} is unknown"),
        ("colour", 1, "'colour' is no setting"),
    ]:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=said) as caught:
            open_run(run, "cpu")
        assert "\n" not in str(caught.value)
        (run / "config.json").write_text(json.dumps(config))
    (run / "config.json").write_text(json.dumps(config | {"data": "/elsewhere", "eval_px": 40}))  # what a resumed run may change
    assert open_run(run, "cpu").config.eval_px == 40


def test_without_safetensors_an_export_says_what_installs_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"\[export\]"):
        cossl.load(run / "export")


def test_heads_are_all_that_an_export_may_lack(run: Path) -> None:
    network = cossl.load(run / "export").network
    assert [getattr(network, head) for head in HEADS] == [None] * 4


# ------------------------------------------------------------------------------------------------- configs and other objects


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_its_flat_dict(name: str) -> None:
    config = PRESETS[name]()
    assert unflatten(Config, json.loads(json.dumps(flatten(config)))) == config
    assert unflatten(Config, flatten(config)) == config


@dataclass(frozen=True)
class Part:
    kind: Literal["a", "b"] = "a"
    sizes: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class Whole:
    count: int = 1
    share: float = 0.5
    where: Path | None = None
    part: Part = field(default_factory=Part)

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count below 0")


def test_json_values_become_what_the_fields_are() -> None:
    flat = {"share": 1, "where": "there", "part.sizes": [1, 0.25]}
    assert unflatten(Whole, flat) == Whole(share=1.0, where=Path("there"), part=Part(sizes=(1.0, 0.25)))
    assert isinstance(unflatten(Whole, flat).share, float)


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"colour": 1}, "'colour' is no setting of Whole"),
        ({"part.colour": 1}, "'colour' is no setting of Part"),
        ({"part": {}}, "'part' is no setting"),
        ({"count.x": 1}, r"'count\.x' is no setting"),
        ({"count.": 1}, r"'count\.' is no setting"),
        ({"part.": 1}, "'' is no setting of Part"),
        ({3: 1}, "3 is no setting"),
        ({"count": 1.0}, r"count = 1\.0: expected int"),
        ({"count": True}, "count = True: expected int"),
        ({"count": -1}, "count below 0"),
        ({"share": True}, "share = True: expected float"),
        ({"share": float("nan")}, "share = nan: expected float"),
        ({"share": float("inf")}, "share = inf: expected float"),
        ({"share": 10**400}, "expected float"),
        ({"count": "1" * 1000}, r"count = '1{76}\.\.\.: expected int"),
        ({"where": 3}, "where = 3: expected"),
        ({"where": ""}, "where = '': expected"),
        ({"part.kind": "c"}, r"kind = 'c': expected"),
        ({"part.sizes": ["x"]}, r"sizes = 'x': expected float"),
        ({"part.sizes": 0.5}, r"sizes = 0\.5: expected"),
    ],
)
def test_a_wrong_setting_is_one_line(flat: dict[Any, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        unflatten(Whole, flat)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [("[1]", "it holds a list"), ("{", "Expecting"), ("[" * 10**6, "nested"), ("\xff", "decode"), ("{}" + " " * 2000, "2,002 bytes")],
)
def test_an_object_that_is_none_is_refused(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "x.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=said):
        read_object(tmp_path / "x.json", 1000 if said.startswith("2,") else 1 << 21)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match="it is no file"):
        read_object(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "none.json")


def test_a_seal_knows_every_change() -> None:
    content = {"a": 1.5, "b": [None, "x"], "c": {2: 3, 10: float("nan")}}
    value = json.loads(json.dumps(sealed(content)))
    assert unsealed(value)["c"].keys() == {"2", "10"}
    for change in ({"a": 1.25}, {"b": [None, "y"]}, {"d": 1}, {"sha256": "0" * 64}):
        with pytest.raises(ValueError, match="it was changed"):
            unsealed(value | change)
    with pytest.raises(ValueError, match="no sha256"):
        unsealed(content)
