"""A class-conditional GAN on the digits, with Madam, in float32 and in LNS.

``python -m examples.paper.gan --out gan``

Generator and discriminator are small MLPs that are told the class (Mirza and Osindero 2014), trained with the
non-saturating loss. How good the images are is measured by a classifier that was trained on the real ones: how often it
sees the class that was asked for, and the Fréchet distance between its hidden features of real and of made images (as
Heusel et al. 2017 do with a larger net; 0 is perfect).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.paper.common import Job, figure, parser_of, run_all, table, write
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training import load_data, prepare_
from lnsdeploy.training.madam import LNSMadam, Madam
from lnsdeploy.training.models import initialise_
from lnsdeploy.training.run import TrainConfig
from lnsdeploy.training.trainer import train

NOISE, HIDDEN, CLASSES, PIXELS = 16, 128, 10, 64


def generator() -> nn.Module:
    """Noise and class to pixels in 0 … 1."""
    return nn.Sequential(
        nn.Linear(NOISE + CLASSES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, PIXELS), nn.Sigmoid(),
    )  # fmt: skip


def discriminator() -> nn.Module:
    """Pixels and class to the logit of being real."""
    return nn.Sequential(
        nn.Linear(PIXELS + CLASSES, HIDDEN), nn.LeakyReLU(0.2), nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2),
        nn.Linear(HIDDEN, 1),
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def classifier() -> nn.Module:
    """A float32 MLP that knows the real digits, the same in every process."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(as_float=True, epochs=30, seed=7), folder)
        from lnsdeploy.training.run import load_run

        return load_run(folder).model


def features(x: Tensor) -> Tensor:
    """The classifier's last hidden layer, 64 numbers an image."""
    parts = list(classifier().children())
    for part in parts[:-1]:
        x = part(x)
    return x


def frechet(a: Tensor, b: Tensor) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2(Σ_a Σ_b)^½) of two sets of features."""
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    one, two = torch.cov(a.T), torch.cov(b.T)
    # the root's trace: eigenvalues of a product of two positive matrices are real and positive
    root = torch.linalg.eigvals(one @ two).real.clamp(min=0).sqrt().sum()
    return float(mean + one.trace() + two.trace() - 2 * root)


def optimizer_of(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimizer by name; GANs want a short memory (Radford et al. 2016)."""
    if name == "madam":
        return Madam(model.parameters(), lr=lr)
    if name == "lns-madam":
        return LNSMadam(model, lr)
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=lr, betas=(0.5, 0.999))
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def train_gan(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train a GAN; its hits and Fréchet distance, and a sheet of its images in the folder.

    Args:
        options: ``optimizer``, ``lr``, ``seed``, ``epochs``, and ``format`` (as ``"8:8"``) for words in both nets.
    """
    seed, epochs = options["seed"], options["epochs"]
    judge_of_classes = classifier()
    torch.manual_seed(seed)
    data = load_data("digits")
    x = torch.tensor(data.train_x).flatten(1)
    y = functional.one_hot(torch.tensor(data.train_y), CLASSES).float()
    nets = []
    for number, model in enumerate((generator(), discriminator())):
        initialise_(model, 2 * seed + number)
        if options.get("format"):
            words = LNSFormat.parse(options["format"])
            model = prepare_(model, Recipe(LayerRecipe(words, words, error=words, gradient=words)))
        nets.append(model)
    make, judge = nets
    optimizers = [optimizer_of(options["optimizer"], net, options["lr"]) for net in nets]
    batches = len(x) // 64
    steps, step = epochs * batches, 0

    def made(classes: Tensor) -> Tensor:
        return make(torch.cat([torch.randn(len(classes), NOISE), classes], dim=1))

    for _ in range(epochs):
        for some in torch.randperm(len(x))[: 64 * batches].view(batches, 64):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = options["lr"] * (1 - step / steps)
                optimizer.zero_grad(set_to_none=True)
            real, classes = x[some], y[some]
            fake = made(classes)
            true, false = judge(torch.cat([real, classes], 1)), judge(torch.cat([fake.detach(), classes], 1))
            (functional.softplus(-true) + functional.softplus(false)).mean().backward()
            optimizers[1].step()
            optimizers[1].zero_grad(set_to_none=True)
            loss = functional.softplus(-judge(torch.cat([fake, classes], 1))).mean()
            if not torch.isfinite(loss):
                return {"hits": None, "distance": None}
            loss.backward()
            optimizers[0].step()
            step += 1
    make.eval()
    with torch.no_grad():
        wanted = torch.arange(1000) % CLASSES
        images = made(functional.one_hot(wanted, CLASSES).float()).view(-1, 1, 8, 8)
        hits = float((judge_of_classes(images).argmax(1) == wanted).float().mean())
        real = features(torch.tensor(data.test_x))
        distance = frechet(features(images), real)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", images[:40].numpy())
    return {"hits": hits, "distance": distance}


def main(argv: list[str] | None = None) -> int:
    """Train, and write table and figure."""
    parser = parser_of(__doc__)
    options = parser.parse_args(argv)
    epochs = options.epochs or 150
    kinds = {
        "Adam, float32": {"optimizer": "adam", "lr": 0.001},
        "Madam, float32": {"optimizer": "madam", "lr": 0.01},
        "Madam, 8:8 W/A/E/G": {"optimizer": "madam", "lr": 0.01, "format": "8:8"},
        "lns-madam, 8:8 W/A/E/G": {"optimizer": "lns-madam", "lr": 0.01, "format": "8:8"},
    }
    jobs = [
        Job(
            kind,
            f"{kind} {seed}".replace(":", "-").replace("/", ""),
            more | {"seed": seed, "epochs": epochs},
            train_gan,
        )
        for seed in range(options.seeds)
        for kind, more in kinds.items()
    ]
    results = run_all(jobs, options.out, options.workers)
    made, axes = figure(9.0, 2.6, len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        name = next(job.name for job in jobs if job.row == kind)
        sheet = np.load(options.out / "runs" / name / "images.npy").reshape(4, 10, 8, 8)
        axis.imshow(sheet.transpose(0, 2, 1, 3).reshape(32, 80), cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(kind, fontsize=8)
        axis.axis("off")
    rows = []
    for kind in kinds:
        hits, far = (
            f"{scale * results.mean(kind, key):.{digits}f} ± {scale * results.spread(kind, key):.{digits}f}"
            for key, scale, digits in (("hits", 100, 1), ("distance", 1, 2))
        )
        rows.append([kind, hits, far])
    write(options.out, "gan", table(["", "class as asked for, %", "Fréchet distance"], rows), results, made)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
