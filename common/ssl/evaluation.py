"""Measurements of a trained encoder: linear probe, nearest neighbours, and how well its representation tells a transformation.

Encoders take images around 0; all functions here take uint8 images (N, C, H, H) and look at their central `size` pixels.
Where a function takes `walk`, it goes through that over what takes long: batches, or penalties of the linear probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.datasets.images import ImageSet
from common.ssl.duet import group_marginal
from common.ssl.steps import as_floats
from common.ssl.transformations import rotate
from common.ssl.views import clean_view, sweep

Walk = Callable[[Sequence[Any]], Iterable[Any]]  # a progress bar, a look for signals
BATCH = 500
NEIGHBOURS, NEIGHBOUR_TEMPERATURE = 200, 0.1  # Wu et al. 2018
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@torch.no_grad()
def encode(encoder: nn.Module, views: Iterable[Tensor]) -> Tensor:
    """Representations (N, F) of batches of views, in evaluation mode; the encoder's own mode is left as it was."""
    was_training = encoder.training
    encoder.eval()
    representations = torch.cat([encoder(view).float() for view in views])
    encoder.train(was_training)
    return representations


def represent(encoder: nn.Module, images: Tensor, size: int, walk: Walk = iter) -> Tensor:
    """Representations (N, F) of images that are not transformed."""
    return encode(encoder, (clean_view(as_floats(part), size) for part in walk(images.split(BATCH))))


def represent_splits(
    encoder: nn.Module, training: ImageSet, test: ImageSet, size: int, walk: Walk = iter
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Representations and labels of the training images, then of the test images."""
    z, z_test = (represent(encoder, split.images, size, walk) for split in (training, test))
    return z, training.labels, z_test, test.labels


# ---- classes -------------------------------------------------------------------------------------------------------------


def fit_linear(z: Tensor, labels: Tensor, n_classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (classes, F) and bias of multinomial logistic regression, with an L2 penalty, by L-BFGS."""
    weight = torch.zeros(n_classes, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(n_classes, device=z.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(z, weight, bias), labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type, unused-ignore]
    return weight.detach(), bias.detach()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Percent of rows whose largest logit is the label's."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def linear_probe(
    z: Tensor, labels: Tensor, z_test: Tensor, labels_test: Tensor, n_classes: int, seed: int, walk: Walk = iter
) -> dict[str, float]:
    """Top-1 accuracy (percent) on the test images of a linear classifier of representations, each feature standardised.

    A tenth of the training images, drawn by the seed, picks the penalty; then all of them train. Test images are used once.
    """
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    z, z_test = (z - mean) / std, (z_test - mean) / std
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed)).to(z.device)
    held_out, rest = order[: max(1, len(z) // 10)], order[max(1, len(z) // 10) :]
    validation = {}
    for penalty in walk(PENALTIES):
        weight, bias = fit_linear(z[rest], labels[rest], n_classes, penalty)
        validation[penalty] = accuracy(F.linear(z[held_out], weight, bias), labels[held_out])
    best = max(PENALTIES, key=lambda penalty: validation[penalty])
    weight, bias = fit_linear(z, labels, n_classes, best)
    return {
        "top_1": accuracy(F.linear(z_test, weight, bias), labels_test),
        "validation_top_1": validation[best],
        "penalty": best,
    }


def nearest_neighbours(z: Tensor, labels: Tensor, z_test: Tensor, labels_test: Tensor, n_classes: int) -> dict[str, float]:
    """Top-1 accuracy (percent) of the weighted vote of the 200 training images that are nearest by cosine (Wu et al. 2018)."""
    z, z_test = F.normalize(z, dim=1), F.normalize(z_test, dim=1)
    k = min(NEIGHBOURS, len(z))
    right = 0
    for part, part_labels in zip(z_test.split(BATCH), labels_test.split(BATCH), strict=True):
        similarity, nearest = (part @ z.T).topk(k, dim=1)
        votes = torch.zeros(len(part), n_classes, device=z.device)
        votes.scatter_add_(1, labels[nearest], (similarity / NEIGHBOUR_TEMPERATURE).exp())
        right += int((votes.argmax(1) == part_labels).sum())
    return {"top_1": 100 * right / len(z_test), "neighbours": k}


def measure_classes(
    encoder: nn.Module, training: ImageSet, test: ImageSet, size: int, n_classes: int, seed: int, walk: Walk = iter
) -> dict[str, dict[str, float]]:
    """Linear probe and nearest neighbours of an encoder, as result.json has them."""
    splits = represent_splits(encoder, training, test, size, walk)
    return {"linear_probe": linear_probe(*splits, n_classes, seed, walk), "knn": nearest_neighbours(*splits, n_classes)}


def raw_pixels(size: int) -> nn.Module:
    """The encoder that returns the pixels themselves, (B, C, H, H) -> (B, C H H), as a baseline.

    Views are averaged down to 32x32: no image set here has more pixels, and thousands of enlarged ones would fill the memory.
    """
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(size, 32)), nn.Flatten())


# ---- transformations -----------------------------------------------------------------------------------------------------


def marginals_by_parameter(
    encoder: nn.Module, images: Tensor, size: int, code: str, bins: int, n: int = 49
) -> tuple[list[float], Tensor]:
    """Group marginals, means over images, as a transformation goes through its range: parameters (n), marginals (n, bins)."""
    swept = sweep(code, as_floats(images), size, n)
    marginals = [group_marginal(encode(encoder, [view]), bins).mean(0) for _, view in swept]
    return [parameter for parameter, _ in swept], torch.stack(marginals)


def circular_mean(distributions: Tensor) -> Tensor:
    """The parameter in [0, 1) at which a distribution over the circle has its mean: (..., bins) -> (...)."""
    bins = distributions.shape[-1]
    angles = 2 * math.pi * (torch.arange(bins, device=distributions.device) + 0.5) / bins
    mean = torch.atan2((distributions * angles.sin()).sum(-1), (distributions * angles.cos()).sum(-1))
    return (mean / (2 * math.pi)) % 1.0


def angle_error(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Mean and median distance between angles in degrees, the short way round; 90 is chance."""
    distance = ((predicted - true + 180) % 360 - 180).abs()
    return {"mean": distance.mean().item(), "median": distance.median().item()}


def rotated(images: Tensor, size: int, seed: int, walk: Walk) -> tuple[Iterable[Tensor], Tensor]:
    """Views of images, each turned by an angle of its own, and the angles (N) in degrees from -180 to 180."""
    gen = torch.Generator().manual_seed(seed)
    degrees = (360 * torch.rand(len(images), generator=gen) - 180).to(images.device)
    parts = walk(list(zip(images.split(BATCH), degrees.split(BATCH), strict=True)))
    return (clean_view(rotate(as_floats(part), angle), size) for part, angle in parts), degrees


def rotation_errors(
    encoder: nn.Module, images: Tensor, test_images: Tensor, size: int, bins: int, seed: int, walk: Walk = iter
) -> dict[str, dict[str, float]]:
    """Errors in degrees of angles that are read off representations of rotated test images.

    "marginal" reads the mean of the group marginal, as DUET shapes it, if there are `bins`; "regression" is linear, from the
    whole representation to the angle's cosine and sine, fitted on training images.
    """
    views, degrees = rotated(images, size, seed, walk)
    z = encode(encoder, views)
    test_views, test_degrees = rotated(test_images, size, seed + 1, walk)
    z_test = encode(encoder, test_views)
    errors = {}
    if bins:
        errors["marginal"] = angle_error(360 * circular_mean(group_marginal(z_test, bins)) - 180, test_degrees)
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    angle = torch.deg2rad(degrees)
    fit = ridge((z - mean) / std, torch.stack([angle.cos(), angle.sin()], 1))
    cos, sin = (with_one((z_test - mean) / std) @ fit).unbind(1)
    return errors | {"regression": angle_error(torch.atan2(sin, cos) * 180 / math.pi, test_degrees)}


def with_one(z: Tensor) -> Tensor:
    """A further feature that is 1, for the intercept: (N, F) -> (N, F + 1)."""
    return torch.cat([z, torch.ones_like(z[:, :1])], 1)


def ridge(z: Tensor, y: Tensor, penalty: float = 1e-3) -> Tensor:
    """Linear regression with an intercept: features (N, F), values (N, k) -> coefficients (F + 1, k)."""
    x = with_one(z).double()
    gram = x.T @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(gram, x.T @ y.double() / len(x)).to(z.dtype)


# ---- all of it -------------------------------------------------------------------------------------------------------------


def as_table(result: dict[str, Any]) -> str:
    """The metrics of an encoder as text: those in the result.json of its run."""
    chance = f"chance {result['chance_top_1']:.3g}"

    def with_baselines(probe: str) -> str:
        pixels, untrained = (result[name][probe]["top_1"] for name in ("raw_pixels", "untrained"))
        return f"{result[probe]['top_1']:.2f} % ({chance}, raw pixels {pixels:.2f}, untrained encoder {untrained:.2f})"

    rows = {
        "test images": result["test_images"],
        "online linear head, top-1": f"{result['test']['track_head_top_1_mean']:.2f} % ({chance})",
        "linear probe, top-1": with_baselines("linear_probe"),
        "nearest neighbours, top-1": with_baselines("knn"),
    }
    for how, error in result.get("rotation_error_degrees", {}).items():
        means = f"{error['mean']:.1f} degrees in the mean, {error['median']:.1f} in the median (chance 90)"
        rows[f"rotation, by the {how}"] = means
    if result["marginals"]:
        learned, uniform = (result["marginals"][name] for name in ("divergence_from_target", "divergence_of_uniform"))
        rows["divergence of marginals from target"] = f"{learned:.4f} nats (of a uniform one {uniform:.4f})"
    return "\n".join(f"{name:>34}: {value}" for name, value in rows.items())
