"""Grids: their points, names and identities; a config as flags and back; grids from TOML; what a user can get wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cossl.models.flags import flatten
from cossl.slurm import grids
from cossl.slurm.folder import Point
from cossl.slurm.grids import GRIDS, IDENTITY_IGNORES, SEEDS, changed, flags_of, points
from cossl.train import PRESETS, Config, parse

FLAT = flatten(Config())
IMPOSSIBLE_ALONE = {  # a field whose other values need company: a value, and the company
    "model.receptive_field": (131, {}),
    "model.backbone": ("resnet18", {"model.receptive_field": None}),
    "model.small_image_stem": (True, {"model.receptive_field": None}),
    "model.method": ("mocov3", {}),
    "model.predictors": ("per_size", {"views.recipe": "multi_crop"}),
    "model.local_stage": (2, {}),
    "recompute": (True, {"compile": False}),
    "norm_group": (2, {}),
}
WORDS = {  # another value of each field that is one word of several
    "precision": "fp32",
    "device": "cpu",
    "on_nonfinite": "skip",
    "model.local_head": "mlp3",
    "model.head_norm": "layer",
    "loss.combine": "additive",
    "loss.local_target": "local_head",
    "loss.local_views": "same",
    "optim.optimizer": "sgd",
    "views.recipe": "multi_crop",
    "positions.strategy": "uniform",
    "loader.backend": "torch",
    "loader.order": "pages",
    "tracking.wandb": "offline",
    "tracking.wandb_project": 'it\'s "mine" & *.*',
    "run_dir": Path("a folder/$x"),
    "data": Path("/pictures, all of them"),
    "loss.temperature": 2e-7,
}


def other(place: str) -> dict[str, Any]:
    """A possible change of this field, with what it needs."""
    value, company = FLAT[place], {}
    if place in IMPOSSIBLE_ALONE:
        value, company = IMPOSSIBLE_ALONE[place]
    elif place in WORDS:
        value = WORDS[place]
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, int):
        value = 2 * value or 2
    else:
        value = value / 3 if value else 1e-6
    return {place: value, **company}


def point(preset: str = "in1k", **changes: Any) -> Point:
    return grids._point("name", preset, changed(PRESETS[preset](), changes), 0)


def back(one: Point) -> dict[str, Any]:
    return json.loads(json.dumps(flatten(parse([one.preset, *one.flags])[1])))


def counted(one: Point) -> dict[str, Any]:
    """What its flags make, without what does not count."""
    return {key: value for key, value in back(one).items() if key not in IDENTITY_IGNORES}


def without_seed(one: Point) -> tuple[list[str], dict[str, Any]]:
    at = one.flags.index("--seed") if "--seed" in one.flags else len(one.flags)
    return [one.preset, *one.flags[:at], *one.flags[at + 2 :]], {key: value for key, value in one.config.items() if key != "seed"}


# ------------------------------------------------------------------------------------------------- the project's own


@pytest.mark.parametrize("grid", GRIDS)
def test_points_are_what_their_flags_make_and_no_two_are_alike(grid: str) -> None:
    found = points(grid, (), (), (), ())
    for one in found:
        if one.seed == SEEDS[-1]:  # the others have its flags but for the seed
            assert counted(one) == one.config
        assert without_seed(one) in [without_seed(last) for last in found if last.seed == SEEDS[-1]]
        assert one.config["seed"] == one.seed
        assert re.fullmatch(r"[a-z][\w.=-]{1,119}", one.run)
    for names in ([p.identity for p in found], [p.run for p in found], [(p.preset, p.name, p.seed) for p in found]):
        assert len(set(names)) == len(names)
    assert {p.preset for p in found} == set(GRIDS[grid][1])
    per_setting = itertools.groupby(found, key=lambda p: (p.preset, p.name))
    assert all(tuple(p.seed for p in group) == SEEDS for _, group in per_setting)


def test_the_ablation_plan_is_both_ablations_crossed_on_both_sets() -> None:
    plan = points("ablation_plan", (), (), (), ())
    keys = ("model.local_head", "loss.local_to_global", "seed")
    expected = set(itertools.product(("in1k", "in100"), ("conv1x1", "mlp2", "mlp3", "conv1x1_deep"), (0.2, 0.5, 0.8), (0, 1, 2)))
    assert len(plan) == 72
    assert {(p.preset, *(p.config[key] for key in keys)) for p in plan} == expected
    assert next(p.name for p in plan if p.flags == []) == "local_head conv1x1, local_to_global 0.5"


def test_grids_share_points() -> None:
    plan, heads, weighting = (points(grid, ("in1k",), (), (), ()) for grid in ("ablation_plan", "heads", "weighting"))
    for some, shared in ((heads, 12), (weighting, 9)):
        assert {(p.identity, p.run) for p in some} <= {(p.identity, p.run) for p in plan}
        assert len(some) == shared


def test_presets_and_seeds_as_asked() -> None:
    found = points("weighting", ("in100", "in1k"), (7,), (), ("--epochs", "50"))
    assert [(p.preset, p.seed, p.config["epochs"]) for p in found] == [("in100", 7, 50)] * 3 + [("in1k", 7, 50)] * 3


def test_grids_that_a_preset_cannot_have_are_told() -> None:
    with pytest.raises(ValueError, match=r"^grid receptive_field: the receptive field of resnet18 is no argument; use an rf_\* backbone$"):
        points("receptive_field", ("in100-resnet18",), (), (), ())
    with pytest.raises(ValueError, match=r"^grid backbone has the point 'local_weight 0' twice"):
        points("backbone", (), (0,), (), ("--loss.local-weight", "0"))


# ------------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize("place", FLAT)
def test_every_field_goes_through_flags_and_into_the_identity_if_it_counts(place: str) -> None:
    changes = other(place)
    company = {key: value for key, value in changes.items() if key != place}
    one, before = point(**changes), point(**company)
    assert back(one)[place] == json.loads(json.dumps(changes[place], default=str)) != FLAT[place]
    assert counted(one) == one.config
    for a, b in ((one.identity, before.identity), (one.run, before.run)):
        assert (a == b) == (place in IDENTITY_IGNORES)


def test_what_cannot_change_a_result_is_ignored_and_nothing_else() -> None:
    assert set(FLAT) >= IDENTITY_IGNORES
    some = {"data", "eval_px", "seed", "epochs", "batch_size", "device_batch_size", "precision", "device", "loader.order", "norm_group"}
    assert not IDENTITY_IGNORES & some
    assert {place for place in FLAT if place.startswith(("model.", "loss.", "optim.", "views.", "positions."))}.isdisjoint(IDENTITY_IGNORES)


@pytest.mark.parametrize("preset", PRESETS)
def test_from_each_preset_to_the_values_of_another(preset: str) -> None:
    for target in (PRESETS["in1k"](), PRESETS["demo"](), PRESETS["imagenette"]()):
        assert parse([preset, *flags_of(preset, target)])[1] == target


def test_the_same_values_from_two_presets_are_two_points() -> None:
    """Their folders have the preset's name; and what `demo` reads without --data is its own."""
    mine, theirs = point("in100"), grids._point("name", "in1k", PRESETS["in100"](), 0)
    assert mine.config == theirs.config
    assert mine.identity != theirs.identity
    assert mine.run != theirs.run


NUMBERS = st.floats(min_value=1e-12, max_value=1.0, allow_nan=False)


@given(rate=NUMBERS, weight=NUMBERS)
@example(rate=1e-6, weight=0.1 + 0.2)
@example(rate=5e-324, weight=1 / 3)
@settings(max_examples=10, deadline=None)
def test_numbers_go_through_flags_bit_for_bit(rate: float, weight: float) -> None:
    config = changed(Config(), {"optim.base_lr": rate, "loss.local_weight": weight})
    assert parse(["in1k", *flags_of("in1k", config)])[1] == config


@given(a=NUMBERS, b=NUMBERS)
@example(a=0.1234567, b=0.1234568)
@settings(max_examples=100, deadline=None)
def test_settings_of_other_values_have_other_names(a: float, b: float) -> None:
    names = [name for name, *_ in grids.expand(Config(), [0], [{"loss.local_weight": a}, {"loss.local_weight": b}])]
    assert (names[0] == names[1]) == (a == b)


def test_names_of_runs_are_safe_whatever_the_values(tmp_path: Path) -> None:
    assert point(**{"optim.base_lr": 1e200}).run.startswith("in1k-base_lr_1e_200-seed0-")
    together = [place for place in FLAT if place not in IMPOSSIBLE_ALONE and place != "model.shared_heads"]
    nasty = {place: other(place)[place] for place in together} | {"seed": 2**63, "optim.base_lr": 1e200}
    run = point(**nasty).run
    for name in (run, grids._point("x", "in1k", PRESETS["in1k-dino"](), 2**63).run):
        assert re.fullmatch(r"[\w.=-]{1,120}", name)
        (tmp_path / name).mkdir()


# ------------------------------------------------------------------------------------------------- --data, and flags for all


def test_where_the_pictures_of_each_preset_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for data, expected in (
        ((), {"in1k": None, "in100": None}),
        (("all",), dict.fromkeys(("in1k", "in100"), f"{tmp_path}/all")),
        (("in1k=a", "in100=/b=c"), {"in1k": f"{tmp_path}/a", "in100": "/b=c"}),
        (("in100=b",), {"in1k": None, "in100": f"{tmp_path}/b"}),
        (("odd=name",), dict.fromkeys(("in1k", "in100"), f"{tmp_path}/odd=name")),
    ):
        found = points("weighting", ("in1k", "in100"), (0,), data, ())
        assert {p.preset: p.config["data"] for p in found} == expected
        assert all(p.flags[:2] == ["--data", expected[p.preset]] for p in found if expected[p.preset])


@pytest.mark.parametrize("data", [("a", "b"), ("in1k=a", "b"), ("in1k=a", "in1k=b"), ("in100=a",), ("in1k=a", "in100=b")])
def test_folders_that_fit_no_preset_are_told(data: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"^--data {' '.join(data)}: expected one folder, or <preset>=<folder> for each of in1k$"):
        points("heads", ("in1k",), (0,), data, ())


def test_another_path_to_the_pictures_is_another_point() -> None:
    assert points("heads", (), (0,), ("/a",), ())[0].identity != points("heads", (), (0,), ("/b",), ())[0].identity


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--run-dir", "x"), "--run-dir is the point's in a sweep: leave it out"),
        (("--resume",), "--resume is always on in a sweep: leave it out"),
        (("--lock-wait-s", "5"), "--lock-wait-s is the job's in a sweep: leave it out"),
        (("--seed", "5"), "--seed comes from --seeds in a sweep: leave it out"),
        (("--epoch", "5"), r"Unrecognized options: --epoch.*\(see cossl train in1k --help\)"),
        (("--loss.local-weight", "2"), ".*local_weight.*"),
    ],
)
def test_flags_that_no_point_can_have_are_told(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        points("heads", (), (), (), flags)


def test_a_wrong_name_of_a_grid_or_preset_is_told() -> None:
    for grid, presets, message in (
        ("head", (), "unknown grid 'head': did you mean heads?"),
        ("zzz", (), "unknown grid 'zzz': expected one of heads, weighting, .*, or a TOML file"),
        ("heads", ("in1",), "unknown preset 'in1': .*did you mean in1k?"),
        ("zzz.toml", (), "zzz.toml does not exist: write it, or give another file"),
    ):
        with pytest.raises(ValueError, match=f"^{message.replace('?', '[?]')}$"):
            points(grid, presets, (), (), ())


# ------------------------------------------------------------------------------------------------- how grids are put together


def test_product_zip_and_exclusion_by_hand() -> None:
    axes = {"a": [1, 2], "b": [3, 4]}
    assert grids.product(axes) == [{"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4}]
    assert grids.zipped(axes) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert grids.excluding(grids.product(axes), [{"a": 1, "b": 4}, {"b": 3}]) == [{"a": 2, "b": 4}]
    assert grids.excluding([{"a": 1}], [{}]) == [{"a": 1}]
    with pytest.raises(ValueError, match=r"^zip: expected equally many values, not 2 of a, 1 of b$"):
        grids.zipped({"a": [1, 2], "b": [3]})


def test_changing_places_that_there_are_not() -> None:
    for place, near in (("epoch", "epochs"), ("model", "model"), ("seed.x", "seed"), ("model.local_heads", "local_head")):
        with pytest.raises(ValueError, match=f"^unknown flag .* in a grid: did you mean {near}[?]$"):
            changed(Config(), {place: 1})
    assert changed(Config(), {}) == Config()


# ------------------------------------------------------------------------------------------------- from a file


@pytest.fixture
def grid_of(tmp_path: Path) -> Callable[[str], list[Point]]:
    def read(text: str) -> list[Point]:
        (tmp_path / "own.toml").write_text(text)
        return points(str(tmp_path / "own.toml"), (), (), (), ())

    return read


def values(found: list[Point], *keys: str) -> list[tuple[Any, ...]]:
    return [(*(p.config[key] for key in keys), p.seed) for p in found]


def test_a_file_has_all_forms(grid_of: Callable[[str], list[Point]]) -> None:
    found = grid_of("""
        presets = ["in100"]
        seeds = [3, 4]
        [base]
        "epochs" = 50
        "compile" = false
        "model.small_image_stem" = true
        "model.receptive_field" = "None"
        [product]
        "model.local_head" = ["conv1x1", "mlp3"]
        [zip]
        "batch_size" = [2048, 4096]
        "optim.warmup_epochs" = [5, 10]
        [[list]]
        "loss.local_weight" = 0.5
        [[list]]
        [[exclude]]
        "model.local_head" = "mlp3"
        "batch_size" = 2048
    """)
    got = values(found, "model.local_head", "batch_size", "optim.warmup_epochs", "loss.local_weight")
    expected = [("conv1x1", 2048, 5.0, 0.3), ("conv1x1", 4096, 10.0, 0.3), ("mlp3", 4096, 10.0, 0.3)]
    expected += [("conv1x1", 256, 10.0, 0.5), ("conv1x1", 256, 10.0, 0.3)]
    assert got == [(*one, seed) for one in expected for seed in (3, 4)]
    keys = ("epochs", "compile", "model.small_image_stem", "model.receptive_field")
    assert {tuple(p.config[key] for key in keys) for p in found} == {(50, False, True, None)}
    assert [p.name for p in found[::2]][-2:] == ["local_weight 0.5", "base"]
    for one in found:
        assert counted(one) == one.config


def test_points_of_a_file_are_those_of_the_code(grid_of: Callable[[str], list[Point]]) -> None:
    """Whichever way a name with points is written, and a whole number where a fraction is meant."""
    own = grid_of('[product]\n"loss.local_to_global" = [0.2, 0.5, 0.8]')
    assert [p.identity for p in own] == [p.identity for p in points("weighting", (), (), (), ())]
    for text in ("[product]\nloss.local-to-global = [0.2, 0.5, 0.8]", "[product.loss]\nlocal_to_global = [0.2, 0.5, 0.8]"):
        assert grid_of(text) == own
    assert [p.identity for p in grid_of('seeds = [0]\n[[list]]\n"loss.local_weight" = 0')] == [
        p.identity for p in points("local_weight", ("in1k",), (0,), (), ()) if p.config["loss.local_weight"] == 0
    ]
    assert [p.name for p in grid_of("seeds = [1]")] == ["base"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("products = {}", "'products' is unknown or of the wrong kind: expected presets, seeds, base, .*"),
        ("seeds = 3", "'seeds' is unknown or of the wrong kind: .*"),
        ("product = [1]", "'product' is unknown or of the wrong kind: .*"),
        ('presets = ["in1"]', "expected presets to be a list of some of demo, .*"),
        ('presets = [["in1k"]]', "expected presets to be a list of some of demo, .*"),
        ("presets = []", "expected presets to be a list of some of demo, .*"),
        ("seeds = []", "expected seeds to be a list of whole numbers, 0 or more"),
        ("seeds = [1.5]", "expected seeds .*"),
        ('seeds = ["0"]', "expected seeds .*"),
        ("seeds = [true]", "expected seeds .*"),
        ("seeds = [-1]", "expected seeds .*"),
        ("list = [1]", r"expected \[\[list\]\] and \[\[exclude\]\] to be tables of flags"),
        ("[product]\nepochs = 50", "expected a list of values for each flag of product and zip, and no flag in both"),
        ("[zip]\nepochs = [50]\n[product]\nepochs = [50]", "expected a list of values .*"),
        ("[zip]\nepochs = [50, 60]\nbatch_size = [32]", "zip: expected equally many values, not 2 of epochs, 1 of batch_size"),
        ("[product]\nepochs = []", "no setting is left: .*"),
        ("[product]\nepochs = [50]\n[[exclude]]\nepochs = 50", "no setting is left: .*"),
        ("[product]\nepochs = [50]\n[[exclude]]\nepoch = 50", "exclude names 'epoch', which no setting has: .*"),
        ('[product]\n"model.local_heads" = ["mlp3"]', r"Unrecognized options: --model.local-heads.*\(see cossl train in1k --help\)"),
        ('[base]\n"epoch" = 3', "Unrecognized options: --epoch.*"),
        ('[base]\n"optim.lars_clip" = "yes"', "Unrecognized options: yes.*"),
        ('[product]\n"model.local_head" = ["mlp7"]', ".*mlp7.*"),
        ('[[list]]\n"epochs" = 1.5', ".*1.5.*"),
        ('[[list]]\n"model.receptive_field" = 100', ".*receptive_field=100 px cannot be reached.*"),
        ("a = [", "is no TOML: .*"),
        ("\udc80", "is no TOML: .*"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? {message}$") as caught:
        points(str(path), (), (), (), ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[[list]]\nseed = 3", "[product]\nseed = [3]", "[base]\nseed = 3"])
def test_a_seed_among_the_flags_is_refused(grid_of: Callable[[str], list[Point]], text: str) -> None:
    with pytest.raises(ValueError, match=r"seed (is no flag of a grid|comes from --seeds)"):
        grid_of(text)


def test_a_point_twice_is_refused(grid_of: Callable[[str], list[Point]]) -> None:
    for text in ("seeds = [1, 1]", "[product]\nepochs = [50, 50]", "[[list]]\n[[list]]\nepochs = 100"):
        with pytest.raises(ValueError, match=r"own.toml has the point '.*' twice: leave one out$"):
            grid_of(text)


def test_a_config_is_a_tree_of_dataclasses_whose_leaves_this_file_knows() -> None:
    """So that a new kind of field is noticed here, before a grid meets it."""
    kinds = {type(value) for value in FLAT.values()}
    assert kinds <= {bool, int, float, str, type(None)}
    assert all(dataclasses.is_dataclass(getattr(Config(), name)) for name in {place.partition(".")[0] for place in FLAT if "." in place})
