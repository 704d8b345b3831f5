"""Losses and gradients of a batch, as all processes together have them; started by a test, alone and by torchrun."""

import sys
from pathlib import Path

import torch

from common import parallel
from common.models.resnet import CifarResNet
from common.ssl.duet import DUET
from common.ssl.essl import ESSL
from common.ssl.simclr import SimCLR

METHODS = {
    "duet": (DUET, ("sca", "rot"), {"bins": 4, "structure": "rot", "target": "vm"}),
    "simclr": (SimCLR, ("sca", "fli"), {}),
    "essl classes": (ESSL, ("sca",), {"predicted": "ron"}),
    "essl value": (ESSL, ("sca",), {"predicted": "rot"}),
}


def main(folder: Path) -> None:
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 10, 10), generator=gen, dtype=torch.uint8)
    labels = torch.randint(0, 3, (20,), generator=gen)
    results = {}
    with parallel.process_group("cpu") as device:
        for name, (method, codes, options) in METHODS.items():
            for n in (12, 7):
                torch.manual_seed(0)
                encoder = CifarResNet((1, 1, 1), in_channels=1, width=2)
                model = method(encoder, codes, 8, n_classes=3, **options)
                model = parallel.synchronise_batch_norm(model.to(device, torch.float64))  # to tell rounding from a mistake
                batch = model.make_batch(images, labels, torch.arange(n), torch.Generator().manual_seed(n), training=True)
                loss, metrics = model.loss(model([view.double() for view in batch.views]), batch, training=True)
                loss.backward()
                parallel.sum_gradients(model.parameters())
                values = {f"grad {key}": p.grad for key, p in model.named_parameters()}
                values |= {f"buffer {key}": value.double() for key, value in model.named_buffers()}
                values |= {key: value.detach().double() for key, value in metrics.items()}
                scale = max(p.grad.abs().max() for p in model.parameters())
                results[f"{name} {n}"] = values | {"scale": scale}
        if parallel.is_main():
            torch.save(results, folder / f"{parallel.world_size()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
