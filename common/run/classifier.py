"""How the networks of a zoo are trained and measured: optimiser and rate of a recipe, one step, accuracy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.datasets.augmentation import Preprocessing
from common.datasets.images import ImageSet
from common.run.epochs import Sums
from common.run.interruption import Interruption
from common.run.schedule import halving, one_cycle

# what they set unless an option says otherwise
RECIPES = {
    "published": {"epochs": 50, "batch_size": 32, "lr": 0.001},
    "fast": {"epochs": 12, "batch_size": 128, "lr": 0.003},
}
WARMUP = 0.2  # share of the steps of `fast` in which the rate rises
EVALUATED_AT_ONCE = 500


def make_optimizer(model: nn.Module, recipe: str, lr: float) -> torch.optim.Optimizer:
    """published: Adam with 1e-4 of the weights in the gradient. fast: AdamW. Decay is for names with "weight" in them.

    Of parameters that take no gradient nothing is moved.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if "weight" in name]
    others = [parameter for name, parameter in trained if "weight" not in name]
    kind, decay = (torch.optim.Adam, 1e-4) if recipe == "published" else (torch.optim.AdamW, 0.05)
    return kind([{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}], lr, fused=True)


def learning_rate(recipe: str, highest: float, step: int, steps_per_epoch: int, epochs: int) -> float:
    """published: halved three times or four. fast: one cycle, by steps."""
    if recipe == "published":
        return highest * halving(step // steps_per_epoch, epochs)
    return highest * one_cycle((step + 1) / (epochs * steps_per_epoch + 1), WARMUP)  # never 0


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, precision: str
) -> dict[str, Tensor]:
    """One step on normalised images (B, 3, 32, 32); its loss and accuracy (a share)."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(x)
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    preprocessing: Preprocessing,
    precision: str = "fp32",
    interruption: Interruption | None = None,
) -> dict[str, float] | None:
    """Mean loss and accuracy (a share) in evaluation mode, every image counting the same; None if a signal comes."""
    model.eval()
    sums = Sums()
    for part in torch.arange(len(data), device=data.labels.device).split(EVALUATED_AT_ONCE):
        if interruption is not None and interruption.signal is not None:
            return None
        x = preprocessing.normalise(data.images[part]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        labels = data.labels[part]
        accuracy = (logits.argmax(1) == labels).double().mean()
        sums.add(len(part), {"loss": F.cross_entropy(logits.float(), labels), "accuracy": accuracy})
    return sums.means()


def accuracy(model: nn.Module, data: ImageSet, preprocessing: Preprocessing) -> float:
    """Percent of images that are right, in evaluation mode."""
    figures = evaluate(model, data, preprocessing)
    assert figures is not None  # nothing can interrupt
    return 100 * figures["accuracy"]
