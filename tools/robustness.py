"""`cossl robustness`: how a run's frozen backbone, with a linear head fitted to its train features, bears what is done to its pictures.

pgd: adversarial pictures, and their one-step case (FGSM). internal: positions of the feature map masked, or replaced by noise, before
pooling. crop: other centre crops and view sizes than the head was fitted at. corruptions: the 15 of ImageNet-C at 5 severities, made of
val's own pictures. imagenet-c: the published ones, as they are (224 px), by a head fitted at their size. Each writes
<run>/robustness/<family>.json and .png, and is skipped when that is there already with the same settings and weights. Of N runs the first
one's folder also gets <family>-of-N-runs.png, with all as lines.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
import tyro

from cossl.models.attacks import Attack, Damage, Norm, damaged, num_damaged, one_step, pgd
from cossl.models.flags import parse_flags
from cossl.pipelines.augment import normalize
from cossl.pipelines.corruption_weather import read_frost
from cossl.pipelines.corruptions import CORRUPTIONS, NAMES, SEVERITIES
from cossl.pipelines.cut import SMALLEST_PX
from cossl.pipelines.imagenet_c import PUBLISHED_PX
from cossl.tools import corruptions
from cossl.tools.comparison import compare
from cossl.tools.opened import data_of, open_run, open_runs, stamp, write_result
from cossl.tools.robustness_figures import curve, draw_curves
from cossl.tools.robustness_judge import CENTRE_FRAC, Hits, Judge

FamilyName = Literal["pgd", "internal", "crop", "corruptions", "imagenet-c"]
PUBLISHED: FamilyName = "imagenet-c"
NORMS: dict[Norm, str] = {"linf": "L-inf", "l2": "L2"}
TOP1 = "top-1, percent"


@dataclass(frozen=True)
class RobustnessArgs:
    """The command line of `cossl robustness`; each field's text is its help."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...")]
    """Folders of runs."""

    families: tuple[FamilyName, ...] = tuple(name for name in get_args(FamilyName) if name != PUBLISHED)
    """What is done to the pictures, as in --families pgd crop; imagenet-c is asked whenever --imagenet-c is given."""

    imagenet_c: Path | None = None
    """Folder with the published ImageNet-C, <corruption>/<severity>/<class>/<picture>; asked about all of it, whatever --pictures says."""

    px: int = 0
    """Side of the view of the head and all families; default: the run's --eval-px, for imagenet-c 224, its pictures as they are."""

    data: Path | None = None
    """Folder with the train pictures that the head is fitted to, and val; default: those of the run."""

    pictures: int = 5000
    """At most so many pictures of val, as many of each class, drawn by --seed; 0 for all."""

    probe_pictures: int = 0
    """At most so many pictures of train for the head, likewise; 0 for all."""

    eps: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """pgd: largest change of any value of a picture, whose range is 0 to 1."""

    eps_l2: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    """pgd: largest Euclidean norm of the change of a picture."""

    steps: int = 20
    """pgd: steps of the gradient."""

    relative_step: float = 0.1
    """pgd: length of a step as a share of eps. Trap: where --steps times this is below 2, a start may be too far from the worst place."""

    shares: tuple[float, ...] = tuple(i / 10 for i in range(10))
    """internal: share of the feature map's positions."""

    crop_fracs: tuple[float, ...] = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
    """crop: side of the centre crop as a fraction of the picture's shorter side, at --px."""

    crop_px: tuple[int, ...] = ()
    """crop: side of the view in px, at the usual centre crop; default: half of --px to twice."""

    corruptions: tuple[str, ...] = NAMES
    """corruptions: which of them; beside ImageNet-C's 15 there are speckle_noise gaussian_blur spatter saturate."""

    severities: tuple[int, ...] = SEVERITIES
    """corruptions: of 1 to 5."""

    frost_dir: Path | None = None
    """corruptions: folder with photographs of frost, larger than the view; without it frost is left out."""

    seed: int = 0
    """Of the choice of pictures and of every draw; each picture's draws are its own."""

    batch_size: int = 64
    """Pictures at once; changes no draw."""

    workers: int = 0
    """Of the loader; default: those of the run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""

    checkpoint: str = ""
    """Another checkpoint of the run than its newest, as in epoch-0010.pt."""

    out: Path | None = None
    """Folder for another copy of the figures with all runs as lines, as OUT/<family>.png."""

    redo: bool = False
    """Ask again what is there already."""

    def __post_init__(self) -> None:
        def all_within(flag: str, values: Sequence[float], low: float, high: float, what: str) -> None:
            if not values or not all(low <= value <= high for value in values) or len(set(values)) < len(values):
                raise ValueError(f"{flag} {' '.join(map(str, values))}: expected {what}{', each once' * (len(values) > 1)}")

        smallest = math.ulp(0.0)
        if not self.runs:
            raise ValueError("no run was given: give the folder of one or more")
        all_within("--eps", self.eps, smallest, 1, "numbers above 0, at most 1")
        all_within("--eps-l2", self.eps_l2, smallest, sys.float_info.max, "numbers above 0")
        all_within("--shares", self.shares, 0, 1, "numbers from 0 to 1")
        all_within("--crop-fracs", self.crop_fracs, smallest, 1, "numbers above 0, at most 1")
        all_within("--crop-px", self.crop_px or (1,), 1, 10_000, "1 to 10000 px")
        all_within("--px", (self.px or SMALLEST_PX,), SMALLEST_PX, 10_000, f"{SMALLEST_PX} to 10000 px")
        all_within("--seed", (self.seed,), 0, 2**63 - 1, "0 or more")
        all_within("--batch-size", (self.batch_size,), 1, 2**31, "1 or more")
        for flag, value in {"--pictures": self.pictures, "--probe-pictures": self.probe_pictures, "--workers": self.workers}.items():
            all_within(flag, (value,), 0, 2**31, "0 or more")
        if unknown := [name for name in self.corruptions or [""] if name not in CORRUPTIONS or self.corruptions.count(name) > 1]:
            raise ValueError(f"--corruptions {unknown[0]}: expected some of {', '.join(CORRUPTIONS)}, each once")
        all_within("--severities", self.severities, 1, 5, "some of 1 2 3 4 5")
        if self.frost_dir is not None and not self.frost_dir.is_dir():
            raise ValueError(f"--frost-dir {self.frost_dir} is no folder: give one with photographs of frost")
        if self.imagenet_c is not None and not self.imagenet_c.is_dir():
            raise ValueError(f"--imagenet-c {self.imagenet_c} is no folder: give the one with gaussian_noise/ and the others")
        if PUBLISHED in self.families and self.imagenet_c is None:
            raise ValueError("--families imagenet-c: give --imagenet-c too, the folder with the published pictures")
        _ = self.attacks()

    def attacks(self) -> dict[tuple[Norm, str], Attack]:
        """ValueError for steps that cannot be."""
        found: dict[tuple[Norm, str], Attack] = {}
        for norm in NORMS:
            found[norm, "PGD"] = Attack(norm, self.steps, self.relative_step, random_start=True, seed=self.seed)
            found[norm, "one step"] = one_step(norm)
        return found


Results = Mapping[str, Mapping[str, Any]]
"""Of one family, by the name of the run."""


class Family(NamedTuple):
    """One way to ask."""

    settings: Callable[[Judge, RobustnessArgs], dict[str, Any]]
    """What the answers depend on, beside the judge's own protocol."""
    ask: Callable[[Judge, RobustnessArgs], dict[str, Any]]
    """The result without its stamp."""
    draw: Callable[[Results, Path], None]
    drawn: tuple[str, ...]
    """The parts of a result that `draw` needs."""
    keys: int
    """So many columns of the table say what was done."""
    value: str
    """The column in which runs are compared."""


# ------------------------------------------------------------------------------------------------- the families


def _pgd_settings(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    own = {"eps_linf": args.eps, "eps_l2": args.eps_l2, "steps": args.steps, "relative_step": args.relative_step}
    loss = "cross-entropy, untargeted, the last iterate"
    return own | {"random_start": "uniform in the ball", "loss": loss, "one_step": "length eps, no random start", "pixels": "0 to 1"}


def _ask_pgd(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    attacks, eps = args.attacks(), {"linf": args.eps, "l2": args.eps_l2}
    classifier, hits = judge.classifier, Hits()
    with torch.no_grad(), judge.bar("pgd", len(judge.chosen) * (1 + sum(len(eps[norm]) for norm, _ in attacks))) as bar:
        for images, label, number in judge.some("pgd", bar=bar):
            x = images.float() / 255
            hits.add("clean", classifier.of_pixels(x), label)
            bar.update(len(x))
            for (norm, name), how in attacks.items():
                for size in eps[norm]:
                    adversarial = pgd(classifier.of_pixels, x, label, number, size, how)
                    hits.add((norm, name, size), classifier.of_pixels(adversarial), label)
                    bar.update(len(x))
    clean = hits.top1("clean")
    rows: list[list[Any]] = [["none", "-", 0, clean]]
    curves, means = [], {}
    for norm, name in attacks:
        top1 = [hits.top1((norm, name, size)) for size in eps[norm]]
        means[f"{name}, {NORMS[norm]}"] = mean = round(sum(top1) / len(top1), 3)
        rows += [[name, NORMS[norm], size, value] for size, value in zip(eps[norm], top1, strict=True)]
        rows.append([name, NORMS[norm], "mean", mean])
        curves.append(curve(f"{name}, {NORMS[norm]}", f"eps: {NORMS[norm]} norm, pixels being 0 to 1", eps[norm], top1, True, clean))
    columns = ["attack", "norm", "eps", TOP1]
    return _result("Accuracy on adversarial pictures", columns, rows, curves, clean, judge) | {"means": means}


def _internal_settings(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    noise = "normal, of the mean and deviation of the channel over the positions of the picture's own map"
    return {"shares": args.shares, "mask": "set to 0", "noise": noise, "positions": "drawn for each picture, to the nearest whole number"}


@torch.no_grad()
def _ask_internal(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    classifier, hits, kinds, positions = judge.classifier, Hits(), get_args(Damage), 0
    for images, label, number in judge.some("internal"):
        y = classifier.encoder.network.backbone(normalize(images))
        positions = y.shape[2] * y.shape[3]
        hits.add("clean", classifier.of_map(y), label)
        for kind in kinds:
            for share, other in zip(args.shares, damaged(y, kind, args.shares, number, judge.seed), strict=True):
                hits.add((kind, share), classifier.of_map(other), label)
    words = {"mask": "masked", "noise": "replaced by noise"}
    rows, curves, means = [], [], {}
    for kind in kinds:
        top1 = [hits.top1((kind, share)) for share in args.shares]
        rows += [
            [words[kind], share, f"{num_damaged(share, positions)} of {positions}", value]
            for share, value in zip(args.shares, top1, strict=True)
        ]
        means[words[kind]] = mean = round(sum(top1) / len(top1), 3)
        rows.append([words[kind], "mean", "", mean])
        curves.append(curve(f"Positions {words[kind]}", "share of the positions before pooling", args.shares, top1))
    columns = ["positions", "share", "count", TOP1]
    found = _result("Accuracy with a damaged feature map", columns, rows, curves, hits.top1("clean"), judge)
    return found | {"means": means}


def _crop_sizes(judge: Judge, args: RobustnessArgs) -> list[int]:
    return list(args.crop_px or dict.fromkeys(max(1, round(judge.px * times)) for times in (0.5, 0.75, 1, 1.25, 1.5, 2)))


def _crop_settings(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    return {"crop_fracs": args.crop_fracs, "crop_px": _crop_sizes(judge, args), "probe_of": "the protocol's px and centre_frac"}


@torch.no_grad()
def _ask_crop(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    classifier, hits, sizes = judge.classifier, Hits(), _crop_sizes(judge, args)
    points = dict.fromkeys([(judge.px, CENTRE_FRAC), *((judge.px, frac) for frac in args.crop_fracs), *((px, CENTRE_FRAC) for px in sizes)])
    with judge.bar("crop", len(judge.chosen) * len(points)) as bar:
        for px, frac in points:
            for images, label, _ in judge.some("crop", px=px, centre_frac=frac, bar=bar):
                hits.add((px, frac), classifier(normalize(images)), label)
                bar.update(len(images))
    rows: list[list[Any]] = [["centre crop", frac, judge.px, hits.top1((judge.px, frac))] for frac in args.crop_fracs]
    rows += [["view size", CENTRE_FRAC, px, hits.top1((px, CENTRE_FRAC))] for px in sizes]
    fracs, views = rows[: len(args.crop_fracs)], rows[len(args.crop_fracs) :]
    curves = [
        curve("Centre crop", f"side of the crop / shorter side, at {judge.px} px", args.crop_fracs, [row[3] for row in fracs]),
        curve("View size", f"px of the view, crop of {CENTRE_FRAC:g}", sizes, [row[3] for row in views]),
    ]
    columns = ["varied", "centre crop", "view px", TOP1]
    return _result("Accuracy on other crops than the head's", columns, rows, curves, hits.top1((judge.px, CENTRE_FRAC)), judge)


def _result(title: str, columns: list[str], rows: list[list[Any]], curves: list[Any], clean: float, judge: Judge) -> dict[str, Any]:
    own = {"classes": len(judge.class_names), "pictures": len(judge.chosen)}
    return {"title": title, "table": {"columns": columns, "rows": rows}, "clean_top1": clean, "curves": curves, **own}


def _corruption_settings(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    frost = str(args.frost_dir.resolve()) if args.frost_dir else "left out: no photographs"
    return {"corruptions": args.corruptions, "severities": args.severities, "frost": frost, "made": "on the view, in pixels"}


def _ask_corruptions(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    classifier, frost = judge.classifier, read_frost(args.frost_dir) if args.frost_dir else ()
    batches = ((some.images, normalize(some.images), some.label, some.number) for some in judge.some("corruptions"))
    how = args.corruptions, args.severities, judge.seed, judge.run.device, frost
    result = corruptions.evaluate_corruptions(classifier, batches, *how)
    return {"title": "Accuracy on corrupted pictures", "table": corruptions.corruption_table(result), **result}


def _imagenet_c_settings(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    every = dict.fromkeys(("pictures", "of_pictures", "chosen"), "all")
    view = f"the whole picture resized to {args.px} px" if args.px else f"the whole picture as published, {PUBLISHED_PX} px"
    return {"imagenet_c": str(args.imagenet_c), "split": "ImageNet-C", **every, "centre_frac": 1.0, "view": view}


def _ask_imagenet_c(judge: Judge, args: RobustnessArgs) -> dict[str, Any]:
    assert args.imagenet_c is not None
    how = judge.class_names, judge.run.device, judge.batch_size
    result = corruptions.evaluate_imagenet_c(judge.classifier, args.imagenet_c, args.px, *how)
    return {"title": "Accuracy on ImageNet-C", "table": corruptions.corruption_table(result), **result}


CURVES, SEVERITY_TABLE = ("curves", "classes"), ("top1", "severities", "clean_top1", "mean_top1")
FAMILIES: dict[str, Family] = {
    "pgd": Family(_pgd_settings, _ask_pgd, draw_curves, CURVES, 3, TOP1),
    "internal": Family(_internal_settings, _ask_internal, draw_curves, CURVES, 3, TOP1),
    "crop": Family(_crop_settings, _ask_crop, draw_curves, CURVES, 3, TOP1),
    "corruptions": Family(_corruption_settings, _ask_corruptions, corruptions.draw_corruptions, SEVERITY_TABLE, 2, "mean"),
    PUBLISHED: Family(_imagenet_c_settings, _ask_imagenet_c, corruptions.draw_corruptions, SEVERITY_TABLE, 2, "mean"),
}


# ------------------------------------------------------------------------------------------------- the command


def result_of(judge: Judge, name: str, args: RobustnessArgs) -> dict[str, Any]:
    """The result in the run's folder if it is of these settings and weights; else it is made, drawn and put there."""
    family, path = FAMILIES[name], judge.run.run_dir / "robustness" / f"{name}.json"
    if name == PUBLISHED:
        judge = replace(judge, view_px=args.px or PUBLISHED_PX)
    protocol = json.loads(json.dumps(judge.protocol(**family.settings(judge, args))))
    if not args.redo and (old := _done(path, family)) is not None:
        if old["protocol"] == protocol:
            print(f"{judge.run.run_dir.name}: {name} is there already ({path}); --redo asks again", file=sys.stderr)
            return old
        print(f"{judge.run.run_dir.name}: {name} is there with other settings or weights, and is asked again", file=sys.stderr)
    result = family.ask(judge, args) | {"figures": []} | stamp(judge.run, **protocol)
    write_result(judge.run, "robustness", name, result)
    path.with_suffix(".png").unlink(missing_ok=True)
    if draw(family, {judge.run.run_dir.name: result}, path.with_suffix(".png")):
        result["figures"] = [f"{name}.png"]
        write_result(judge.run, "robustness", name, result)
    return result


def _done(path: Path, family: Family) -> dict[str, Any] | None:
    """What stands in the file, if that is a whole result."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and {"protocol", "table", "title", "pictures", *family.drawn} <= found.keys()
    return found if whole else None


def draw(family: Family, results: Results, path: Path) -> bool:
    """False, after a line that says why, where matplotlib is missing or there is nothing to draw."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        family.draw(results, path)
    except ImportError:
        print(f"{path.name} is not drawn: matplotlib is not installed: pip install -c constraints.txt -e '.[log]'", file=sys.stderr)
    except ValueError as error:
        print(f"{path.name} is not drawn: {error}", file=sys.stderr)
    return path.exists()


def table(results: Results, family: Family) -> Iterator[str]:
    """The table of one run; of several, what was done and a column for each run."""
    whole = next(iter(results.values()))["table"]
    columns, rows = whole["columns"], whole["rows"]
    if len(results) > 1:
        columns, done = [*columns[: family.keys], *results], dict[tuple[str, ...], dict[str, Any]]()
        for name, result in results.items():
            value = result["table"]["columns"].index(family.value)
            for row in result["table"]["rows"]:
                done.setdefault(tuple(map(_shown, row[: family.keys])), {})[name] = row[value]
        rows = [[*what, *(values.get(name, "-") for name in results)] for what, values in done.items()]
    cells = [columns, *([*map(_shown, row[: family.keys]), *map(_number, row[family.keys :])] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        left = [f"{cell:<{width}}" for cell, width in zip(line[: family.keys], widths, strict=False)]
        yield "  ".join([*left, *(f"{cell:>{width}}" for cell, width in zip(line[family.keys :], widths[family.keys :], strict=True))])


def _shown(cell: Any) -> str:
    return f"{cell:g}" if isinstance(cell, float) else str(cell)


def _number(cell: Any) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def robustness_main(argv: Sequence[str]) -> None:
    """`cossl robustness`. Raises ValueError, OSError or ImportError for a user's mistake."""
    args = parse_flags(RobustnessArgs, argv, "cossl robustness", __doc__ or "")
    judges = []
    for run in open_runs(args.runs, args.device):
        opened = open_run(run.run_dir, args.device, args.checkpoint) if args.checkpoint else run
        how = args.pictures, args.probe_pictures, args.seed, args.batch_size, args.workers, args.px
        judges.append(Judge(opened, data_of(opened, args.data), *how))
    for name in dict.fromkeys([*args.families, *([PUBLISHED] if args.imagenet_c is not None else [])]):
        results = {judge.run.run_dir.name: result_of(judge, name, args) for judge in judges}
        first = next(iter(results.values()))
        pictures = " and ".join(dict.fromkeys(str(result["pictures"]) for result in results.values()))
        print("\n".join([f"{first['title']}: {FAMILIES[name].value}, {pictures} pictures", *table(results, FAMILIES[name]), ""]))
        if len(judges) > 1:
            files = {judge.run.run_dir.name: judge.run.run_dir / "robustness" / f"{name}.json" for judge in judges}
            compare(judges[0].run.run_dir / "robustness", name, files, functools.partial(draw, FAMILIES[name], results))
        if args.out is not None:
            draw(FAMILIES[name], results, args.out / f"{name}.png")
