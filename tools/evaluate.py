"""`cossl eval RUN`: how much the representation of a run, frozen or fine-tuned, says about labels, by the protocols that papers use.

Tasks, each with its result in <run>/eval/<task>.json (and figures beside it):
  knn         weighted kNN on unit vectors (Wu et al. 2018), every --k and --temperature in one search
  linear      a linear probe: every pair of --base-lrs and --weight-decays is a classifier of its own, all trained in the same passes over
              the data (as DINOv2's) by SGD with momentum 0.9 and a cosine to 0; the best is chosen on a part held out of train, never on
              val, and trained again on all of train. Top-1, top-5, accuracy of every class, confusion figure; with `--features position`
              one probe for every position of the feature map, and a map of their accuracies. On central squares unless --augment is
              given, which most papers have: random crops and flips
  fewshot-1   the same probe on 1 % of the labels of every class, at least one picture of each; drawn by --seed, not SimCLR's lists
  fewshot-10  on 10 %
  finetune    the whole network and a linear layer on its global vector trained on all labels, by SGD with Nesterov momentum, on random
              crops and flips (--finetune.*); the learning rate is chosen on the same held-out part as the probe's, then all of train is
              trained on. Top-1, top-5, accuracy of every class, confusion figure; the network is kept beside the result
  finetune-1  the same on 1 % of the labels, those of fewshot-1: the semi-supervised protocol
  finetune-10 on 10 %

Vectors are computed once, kept in <run>/eval/cache and used by all tasks, and by the next call; where they do not fit into --memory-gib
the linear probe computes them anew in every epoch. A killed call goes on when it is given again: what has its result is skipped unless
settings, pictures or checkpoint changed. Several processes (torchrun, srun) share the work: each runs the network on a part of the
pictures, searches the neighbours of a part of them and trains a part of the classifiers. 12 x 12 pixels, the floor of every table, go
through the same protocols.

Examples:
  cossl eval runs/in1k-2026-01-31-120000
  cossl eval RUN --tasks linear --features global local_mean position --epochs 100
  cossl eval RUN --tasks knn linear --dataset pets --dataset-root ~/data
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tqdm import tqdm

from cossl.models.flags import parse_flags
from cossl.models.launch import any_rank, first_rank, join, leave, say
from cossl.models.probe import knn_top1s
from cossl.tools.eval_features import PIXELS, VERSION, Subject, features, fitting, forget, gib, label_of, shapes
from cossl.tools.eval_finetune import FinetuneArgs, FinetuneSettings, finetune
from cossl.tools.eval_linear import ProbeSettings, linear
from cossl.tools.eval_pictures import PictureSet, dataset_set, digest, folder_set
from cossl.tools.opened import Opened, data_of, open_run, stamp, write_result

FeatureName = Literal["global", "local_mean", "position"]


@dataclass(frozen=True)
class EvalArgs:
    """The command line of `cossl eval`; each field's text is its help."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""

    tasks: tuple[str, ...] = ("knn", "linear", "fewshot-1", "fewshot-10")
    """Which of the tasks above."""

    features: tuple[FeatureName, ...] = ("global", "local_mean")
    """global: the vector Y after pooling and the MLP behind it. local_mean: the mean of the local vectors, without that MLP (the same as
    global where there is none). position: each local vector by itself, for the linear probes."""

    data: Path | None = None
    """Other pictures than the run's own: a folder with train.beton and val.beton, or with image folders train/ and val/."""

    dataset: Literal["cifar10", "cifar100", "flowers102", "pets", "dtd", "stl10"] | None = None
    """Pictures of a torchvision dataset instead, whose files lie in --dataset-root; nothing is downloaded. flowers102 and dtd are trained
    on train and val together; all are tested on test."""

    dataset_root: Path | None = None
    """The folder that torchvision calls root."""

    px: int = 0
    """Side of the pictures; 0 means the run's --eval-px."""

    centre_frac: float = 224 / 256
    """The central square that is seen, as a fraction of the shorter side: 0.875 is the usual 224 of 256."""

    k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours of the kNN (these are DINO's)."""

    temperature: tuple[float, ...] = (0.07,)
    """A neighbour votes with exp(cosine / temperature)."""

    epochs: int = 90
    """Passes of the linear probes over train; 100 is usual too."""

    batch_size: int = 256
    """Pictures per step of the linear probes; of a smaller set all of it."""

    base_lrs: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    """Learning rates of the probes, per 256 pictures, for vectors of zero mean and mean square length 1 (they are scaled to that)."""

    weight_decays: tuple[float, ...] = (0.0, 1e-6, 1e-5)
    """Weight decays, each with every learning rate; for features of deviation 1 they are as many times larger as a vector has numbers."""

    held_out_frac: float = 0.1
    """Part of every class of train on which the best probe is chosen."""

    refit: bool = True
    """Train the best one again on all of train; --no-refit takes it as it is."""

    augment: bool = False
    """Train the linear probe on random crops and flips, new ones in each epoch: the whole network then runs in every epoch."""

    seed: int = 0
    """Of what is held out, of the few shots, and of the order of the pictures."""

    memory_gib: float = 16.0
    """Memory of each process for vectors, and for probes that are trained at once."""

    workers: int = 0
    """Threads or processes that decode; 0 means as many as the run had."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU if there is one."""

    checkpoint: str = ""
    """Another checkpoint of the run than the newest, such as epoch-0050.pt; the results then bear its name."""

    finetune: FinetuneArgs = field(default_factory=FinetuneArgs)

    out: Path | None = None
    """Folder of the results instead of <run>/eval."""

    redo: bool = False
    """Do again what has a result with these settings, the vectors too. A training that was killed goes on all the same."""

    keep_cache: bool = True
    """--no-keep-cache removes the vectors once all tasks are done."""

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"--tasks {task}: expected some of {', '.join(TASKS)}")
        for name, low in {
            "k": 1,
            "epochs": 1,
            "batch_size": 1,
            "base_lrs": 0,
            "weight_decays": 0,
            "seed": 0,
            "workers": 0,
            "px": 0,
        }.items():
            given = getattr(self, name)
            if not all(low <= value < math.inf for value in (given if isinstance(given, tuple) else (given,))) or given == ():
                raise ValueError(f"--{name.replace('_', '-')} {given}: expected {low} or more")
        if not self.tasks or not self.features or not self.temperature or not all(0 < each < math.inf for each in self.temperature):
            raise ValueError("--tasks, --features and --temperature: expected at least one of each, temperatures above 0")
        if not 0 < self.held_out_frac < 1:
            raise ValueError(f"--held-out-frac {self.held_out_frac}: expected more than 0 and less than 1")
        if not 0 < self.centre_frac <= 1 or not 0 < self.memory_gib < math.inf:
            raise ValueError(f"--centre-frac {self.centre_frac}, --memory-gib {self.memory_gib}: expected 0 to 1, and more than 0")
        if (self.dataset is None) != (self.dataset_root is None) or (self.dataset and self.data):
            raise ValueError("--dataset and --dataset-root go together, without --data")


class Task(NamedTuple):
    """One protocol: what of the settings it depends on, and how it is done."""

    title: str
    settings: Callable[[EvalArgs], dict[str, Any]]
    """Plain values: a result is done again when they change."""
    run: Callable[[Subject, EvalArgs, str, Path], dict[str, Any]]
    """(subject, arguments, name of the result, its folder) to `table`, `figures` (written there) and content of its own, on every rank."""


# ------------------------------------------------------------------------------------------------- kNN


def knn_settings(args: EvalArgs) -> dict[str, Any]:
    return {"k": sorted(set(args.k)), "temperature": list(args.temperature), "vote": "exp(cosine / temperature)"}


def knn(subject: Subject, args: EvalArgs, name: str, out: Path) -> dict[str, Any]:
    """Every k and temperature for each feature that is one vector."""
    names = [*(each for each in args.features if each != "position"), PIXELS]
    if names == [PIXELS]:
        raise ValueError("--tasks knn --features position: the kNN compares whole pictures, add global or local_mean, or leave it out")
    sizes = {name: sum(gib(subject, {name: size}, split) for split in ("train", "val")) for name, size in shapes(subject, names).items()}
    if (most := max(sizes.values())) > args.memory_gib:
        raise ValueError(f"the vectors of the kNN take {most:.1f} GiB: raise --memory-gib")
    tops: dict[str, dict[tuple[int, float], float]] = {}
    for some in fitting(sizes, args.memory_gib):
        tops |= _tops(subject, args, some)
    rows = [[label_of(name), k, temperature, round(top, 2)] for name in names for (k, temperature), top in tops[name].items()]
    return {"table": {"columns": ["features", "k", "temperature", "top-1 %"], "rows": rows}, "figures": []}


def _tops(subject: Subject, args: EvalArgs, names: Sequence[str]) -> dict[str, dict[tuple[int, float], float]]:
    train, val = (features(subject, split, names) for split in ("train", "val"))
    device, (train_y, val_y) = subject.run.device, (y.to(subject.run.device) for y in subject.pictures.labels.values())
    found = {}
    for name in names:

        def bar(parts: list[Any], what: str = f"kNN, {label_of(name)}") -> Iterable[Any]:
            return tqdm(parts, desc=what, disable=subject.ranks.rank > 0 or not sys.stderr.isatty(), leave=False)

        train_x, val_x = (x[name][0].to(device) for x in (train, val))
        found[name] = knn_top1s(train_x, train_y, val_x, val_y, args.k, args.temperature, subject.ranks, bar)
    return found


# ------------------------------------------------------------------------------------------------- linear probes


def probe_settings(args: EvalArgs, percent: int) -> ProbeSettings:
    grid = (args.epochs, args.batch_size, args.base_lrs, args.weight_decays)
    return ProbeSettings(*grid, args.held_out_frac, args.refit, args.augment and percent == 100, args.seed, percent)


def linear_task(title: str, percent: int = 100) -> Task:
    """A linear probe on a part of the labels."""

    def run(subject: Subject, args: EvalArgs, name: str, out: Path) -> dict[str, Any]:
        return linear(subject, probe_settings(args, percent), args.features, name, out, args.memory_gib)

    return Task(title, lambda args: probe_settings(args, percent).protocol(), run)


def finetune_task(title: str, percent: int = 100) -> Task:
    """Fine-tuning on a part of the labels."""

    def settings(args: EvalArgs) -> FinetuneSettings:
        return FinetuneSettings(args.finetune, args.held_out_frac, args.refit, args.seed, percent)

    def run(subject: Subject, args: EvalArgs, name: str, out: Path) -> dict[str, Any]:
        return finetune(subject, settings(args), name, out)

    return Task(title, lambda args: settings(args).protocol(), run)


TASKS: dict[str, Task] = {
    "knn": Task("Weighted kNN", knn_settings, knn),
    "linear": linear_task("Linear probe"),
    "fewshot-1": linear_task("Linear probe on 1 % of the labels", 1),
    "fewshot-10": linear_task("Linear probe on 10 % of the labels", 10),
    "finetune": finetune_task("Fine-tuning"),
    "finetune-1": finetune_task("Fine-tuning on 1 % of the labels", 1),
    "finetune-10": finetune_task("Fine-tuning on 10 % of the labels", 10),
}

# ------------------------------------------------------------------------------------------------- the command


def picture_set(run: Opened, args: EvalArgs) -> PictureSet:
    """The pictures asked for, else those that the run was trained on; for all ranks as the first one sees them."""
    if args.dataset is not None and args.dataset_root is not None:
        pictures = dataset_set(args.dataset, args.dataset_root)
    else:
        pictures = folder_set(data_of(run, args.data), run.config.loader)
    return pictures._replace(identity=first_rank(lambda: pictures.identity))


def result_name(task: str, args: EvalArgs, run: Opened, pictures: PictureSet) -> str:
    """`linear`, and with what makes it another than the run's own: `linear-pets`, `linear-epoch-0050`."""
    own = args.dataset is None and (args.data is None or (run.config.data is not None and args.data.resolve() == run.config.data.resolve()))
    words = [task, "" if own else pictures.name, Path(args.checkpoint).stem]
    return "-".join(re.sub(r"[^\w.+-]+", "_", word) for word in words if word)


NETWORK = ("checkpoint", "step", "weights")
"""What of a protocol tells how far the run was."""


def protocol_of(task: Task, subject: Subject, args: EvalArgs) -> dict[str, Any]:
    """All that a result of this task depends on, as JSON gives it back."""
    network = dict(zip(NETWORK, (subject.run.checkpoint, subject.run.encoder.step, subject.run.weights), strict=True))
    cut = {"crop_px": subject.px, "centre_frac": subject.centre_frac, "features": list(args.features)}
    whole = network | {"version": VERSION, "dataset": subject.pictures.name, "pictures": subject.pictures.identity} | cut
    found: dict[str, Any] = json.loads(json.dumps(whole | task.settings(args)))
    return found


def done_before(path: Path, protocol: dict[str, Any]) -> dict[str, Any] | None:
    """The result that is there already, if it is of this protocol and all that it names lies beside it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        whole = all((path.parent / name).exists() for name in (*result["figures"], *result.get("weights", [])))
        return result if result["protocol"] == protocol and result["table"]["rows"] and whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def place_of(out: Path, title: str, protocol: dict[str, Any]) -> str:
    """The name for this result: the title, unless a result of other settings has it, which is kept; then with a hash of the settings.

    A result of the same settings is replaced: it is of another state of the run, of the pictures, or of the code.
    """
    ours = _settings(protocol)
    try:
        there = _settings(json.loads((out / f"{title}.json").read_text(encoding="utf-8"))["protocol"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return title
    return title if there == ours else f"{title}-{digest(ours)[:8]}"


def _settings(protocol: dict[str, Any]) -> dict[str, Any]:
    data = protocol["pictures"]["data"]
    return {key: value for key, value in protocol.items() if key not in (*NETWORK, "version", "pictures")} | {"data": data}


def table(result: dict[str, Any]) -> Iterator[str]:
    """A result for people, line by line."""
    rows = [result["table"]["columns"], *([_shown(value) for value in row] for row in result["table"]["rows"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    yield f"\n{result['title']}"
    for row in rows:
        yield "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))


def _shown(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def one_task(name: str, subject: Subject, args: EvalArgs) -> None:
    """Does it, unless it has its result; writes and says it. Every rank has to call it."""
    task, run = TASKS[name], subject.run
    out, protocol = args.out or run.run_dir / "eval", protocol_of(task, subject, args)
    title = first_rank(lambda: place_of(out, result_name(name, args, run, subject.pictures), protocol))
    before = None if args.redo else first_rank(lambda: done_before(out / f"{title}.json", protocol))
    if before is not None:
        say("\n".join(table(before)) + "\n(done before; --redo does it again)")
        return
    found = {"title": f"{task.title}, {subject.pictures.name}"} | task.run(subject, args, title, out)
    result = found | stamp(run, **protocol)
    if subject.ranks.rank == 0:
        path = write_result(run, "eval", title, result, args.out)
        say("\n".join(table(result)) + f"\n{path}")


def in_short(run: Opened, args: EvalArgs) -> EvalArgs:
    """Nothing twice: neither tasks nor features, nor local_mean where it is the global vector itself."""
    args = replace(args, tasks=tuple(dict.fromkeys(args.tasks)), features=tuple(dict.fromkeys(args.features)))
    if run.config.model.mlp_after_pool or not {"global", "local_mean"} <= set(args.features):
        return args
    say("local_mean is left out: this network has no MLP after pooling, so it is the global vector")
    return replace(args, features=tuple(name for name in args.features if name != "local_mean"))


def eval_main(argv: Sequence[str]) -> None:
    """`cossl eval`. Raises ValueError, OSError or ImportError for a user's mistake."""
    args = parse_flags(EvalArgs, argv, "cossl eval", __doc__ or "")
    run = open_run(args.run, args.device, args.checkpoint)
    ranks = join(run.device)
    try:
        if any_rank(first_rank(lambda: run.weights) != run.weights):
            raise ValueError(f"{run.run_dir} got a new checkpoint while it was opened: try again, or give --checkpoint epoch-....pt")
        args = in_short(run, args)
        cache, workers = (args.out or run.run_dir / "eval") / "cache", args.workers or run.config.loader.workers
        subject = Subject(run, picture_set(run, args), args.px or run.config.eval_px, args.centre_frac, workers, cache, ranks)
        if args.redo:
            first_rank(lambda: forget(cache, trained=False))
        for name in args.tasks:
            one_task(name, subject, args)
    finally:
        leave()
    if not args.keep_cache and ranks.rank == 0:
        forget(cache)
