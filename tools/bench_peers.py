"""The peers of `cossl bench step`: BYOL as lightly's and byol-pytorch's own documents run it, on our backbone, views and precision.

What is made equal: backbone, widths of the heads, picture set, batch size, autocast, size and probabilities of the augmentation, number of
loader processes. What is theirs: the loop, the optimizer, the memory format, PIL's or torchvision's augmentation, ImageFolder's loader.
They compute BYOL's global term alone; ours adds its local terms, unless --loss.local-weight 0 is given too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cossl.models.rf_resnet import make_backbone
from cossl.pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, blur_radius
from cossl.pipelines.views import ViewSpec
from cossl.train import AUTOCAST, Config


@dataclass(frozen=True)
class Job:
    """What a peer is asked for."""

    config: Config
    device: torch.device
    folder: Path | None
    """The pictures as an image folder; None: only the step can be measured."""

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The two global views."""
        views: tuple[ViewSpec, ...] = self.config.views.specs()
        return views[:2]

    def backbone(self) -> tuple[nn.Module, int]:
        """Pictures to pooled vectors, and their width: a new network of the config's kind."""
        model = self.config.model
        net = make_backbone(model.backbone, model.receptive_field, model.width, model.small_image_stem)
        return nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten()), net.out_channels

    def autocast(self) -> torch.autocast:
        precision = self.config.precision
        return torch.autocast(self.device.type, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


class Running(NamedTuple):
    """A peer at work: its step, a resident batch for it, and its loader's batches (None without an image folder)."""

    step: Callable[[Any], None]
    resident: Any
    open: Callable[[], Iterator[Any]] | None


class Peer(NamedTuple):
    package: str
    install: str
    start: Callable[[Job], Running]


def _batches(job: Job, transform: Any) -> Callable[[], Iterator[Any]] | None:
    """torchvision's ImageFolder in a DataLoader, as many epochs as are asked for; memory is pinned where there is a GPU."""
    if job.folder is None:
        return None
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    pictures, workers = ImageFolder(str(job.folder), transform), job.config.loader.workers
    pin = job.device.type == "cuda"
    loader = DataLoader(pictures, job.config.batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pin)

    def epochs() -> Iterator[Any]:
        while True:
            yield from loader

    return epochs


def _descend(job: Job, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor]) -> None:
    with job.autocast():
        loss = loss_of()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


# ---- lightly ----------------------------------------------------------------------------------------------------------------------


def _lightly(job: Job) -> Running:
    """docs.lightly.ai/self-supervised-learning/examples/byol.html: SGD 0.06, one view after the other, the moving average first."""
    parts: list[Any] = [import_module(f"lightly.{name}") for name in ("loss", "models.modules", "models.utils")]
    losses, modules, utils = parts
    transforms: Any = import_module("lightly.transforms.byol_transform")
    model, criterion = job.config.model, losses.NegativeCosineSimilarity()
    backbone, channels = job.backbone()
    projector = modules.BYOLProjectionHead(channels, model.hidden_dim, model.out_dim)
    online = nn.Sequential(backbone, projector).to(job.device)
    predictor = modules.BYOLPredictionHead(model.out_dim, model.hidden_dim, model.out_dim).to(job.device)
    target = copy.deepcopy(online)
    utils.deactivate_requires_grad(target)
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)

    def loss_of(views: list[Tensor]) -> Tensor:
        predicted, wanted = [predictor(online(x)) for x in views], [target(x).detach() for x in views]
        loss: Tensor = 0.5 * (criterion(predicted[0], wanted[1]) + criterion(predicted[1], wanted[0]))
        return loss

    def step(batch: Any) -> None:
        utils.update_momentum(online, target, m=0.99)
        views = [view.to(job.device, non_blocking=True) for view in batch[0]]
        _descend(job, optimizer, lambda: loss_of(views))

    shape = (job.config.batch_size, 3, job.views[0].size_px, job.views[0].size_px)
    resident = [torch.randn(shape, device=job.device) for _ in job.views]
    drawn = transforms.MultiViewTransform([_lightly_view(transforms.BYOLView1Transform, view) for view in job.views])
    return Running(step, (resident,), _batches(job, drawn))


def _lightly_view(transform: Any, view: ViewSpec) -> Any:
    """The same distribution as ours; view 1 and view 2 of lightly differ in their defaults alone."""
    return transform(
        input_size=view.size_px,
        min_scale=view.area_frac[0],
        hf_prob=view.flip_p,
        cj_prob=view.jitter_p,
        cj_bright=view.brightness,
        cj_contrast=view.contrast,
        cj_sat=view.saturation,
        cj_hue=view.hue,
        random_gray_scale=view.grayscale_p,
        gaussian_blur=view.blur_p,
        sigmas=view.blur_sigma_px,
        solarization_prob=view.solarize_p,
    )


# ---- byol-pytorch -----------------------------------------------------------------------------------------------------------------


def _byol_pytorch(job: Job) -> Running:
    """github.com/lucidrains/byol-pytorch, README: Adam 3e-4, augmentation inside on the device, drawn once for the whole batch.

    Its simplicial embeddings, on by default since 0.9, are no part of BYOL and stay off.
    """
    from torchvision import transforms as T

    package: Any = import_module("byol_pytorch")

    model, size = job.config.model, job.views[0].size_px
    first, second = (_torchvision_view(view) for view in job.views)
    learner = package.BYOL(
        job.backbone()[0].to(job.device),
        image_size=size,
        hidden_layer=-1,
        projection_size=model.out_dim,
        projection_hidden_size=model.hidden_dim,
        augment_fn=first,
        augment_fn2=second,
        use_simplicial_embeddings=False,
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-4)

    def step(batch: Any) -> None:
        pictures = batch[0].to(job.device, non_blocking=True)
        _descend(job, optimizer, lambda: learner(pictures))
        learner.update_moving_average()

    resident = (torch.rand(job.config.batch_size, 3, size, size, device=job.device),)
    return Running(step, resident, _batches(job, T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.ToTensor()])))


def _torchvision_view(view: ViewSpec) -> nn.Module:
    """The same steps as torchvision modules; a module draws once for all pictures of a batch."""
    from torchvision import transforms as T

    jitter = T.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = T.GaussianBlur(2 * blur_radius(view.size_px) + 1, view.blur_sigma_px)
    return nn.Sequential(
        T.RandomResizedCrop(view.size_px, view.area_frac, view.aspect, antialias=True),
        T.RandomHorizontalFlip(view.flip_p),
        T.RandomApply([jitter], view.jitter_p),
        T.RandomGrayscale(view.grayscale_p),
        T.RandomApply([blur], view.blur_p),
        T.RandomSolarize(0.5, view.solarize_p),
        T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    )


PEERS = {
    "lightly": Peer("lightly", "pip install lightly", _lightly),
    "byol-pytorch": Peer("byol_pytorch", "pip install byol-pytorch", _byol_pytorch),
}
