"""Losses and gradients of a batch, as all processes together have them; started by a test, alone and by torchrun."""

import sys
from pathlib import Path

import torch

from common import parallel
from common.models.resnet import CifarResNet
from common.ssl.method import Method

METHODS = {
    "duet": Method(("sca", "rot"), 8, bins=4, structure="rot", target="vm", weight=10.0),
    "simclr": Method(("sca", "fli"), 8),
    "essl classes": Method(("sca",), 8, predicts="ron", weight=0.4),
    "essl value": Method(("sca",), 8, predicts="rot", weight=0.4),
}


def main(folder: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 10, 10), generator=gen, dtype=torch.uint8)
    labels = torch.randint(0, 3, (20,), generator=gen)
    found = {}
    with parallel.process_group("cpu") as device:
        for name, method in METHODS.items():
            for n in (12, 7):
                torch.manual_seed(0)
                encoder = CifarResNet((1, 1, 1), in_channels=1, width=2)
                model = method.make_model(encoder, 3).to(device, torch.float64)  # to tell rounding from a mistake
                model = parallel.synchronise_batch_norm(model)
                chosen = torch.arange(n)
                batch = method.make_batch(images, labels, chosen, torch.Generator().manual_seed(n), training=True)
                loss, figures = method.loss(
                    model(batch.view1.double(), batch.view2.double(), of(batch.task)), batch, training=True
                )
                loss.backward()
                parallel.sum_gradients(model.parameters())
                values = {f"grad {key}": p.grad for key, p in model.named_parameters()}
                values |= {f"buffer {key}": value.double() for key, value in model.named_buffers()}
                values |= {key: value.detach().double() for key, value in figures.items()}
                scale = max(p.grad.abs().max() for p in model.parameters())
                found[f"{name} {n}"] = values | {"scale": scale}
        if parallel.is_main():
            torch.save(found, folder / f"{parallel.world_size()}.pt")


def of(task: torch.Tensor | None) -> torch.Tensor | None:
    return None if task is None else task.double()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
