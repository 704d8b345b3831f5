"""DUET, SimCLR and ESSL: an encoder with the heads that train it, and saved encoders to use elsewhere.

    encoder = load_encoder("some_dir/encoder_cifar10_duet_rot_eq-rot_target-vm_final.pt")
    z = encoder(images - 0.5)  # images (B, C, H, W) in [0, 1] -> representations (B, 512)

Names of modules are the published ones, so that published weights fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import checkpoint
from common.errors import InputError
from common.models.resnet import CifarResNet
from common.ssl.losses import VALUE_CODES

HIDDEN, EMBEDDING = 2048, 128
CLASSES = {"ron": 4, "fli": 2, "flv": 2, "gra": 2}  # what ESSL tells apart; of VALUE_CODES it predicts the number
ESSL_CODES = (*CLASSES, *VALUE_CODES)


@dataclass(frozen=True)
class Outputs:
    """What a model says of two views, and, with ESSL, of a third input."""

    representation1: Tensor  # (B, F)
    representation2: Tensor
    embedding1: Tensor  # (B, 128), for NT-Xent
    embedding2: Tensor
    class_logits: Tensor  # (B, classes), of view 1; no gradient goes from here to the encoder
    essl_logits: Tensor | None = None

    def float(self) -> Outputs:
        """All of it in fp32, as losses want it."""
        return replace(self, **{name: tensor.float() for name, tensor in vars(self).items() if tensor is not None})


class SelfSupervised(nn.Module):
    """An encoder, a projection head, a linear classifier beside it, and a predictor of transformations for ESSL.

    With `bins` = G > 0 (DUET) a representation is a matrix (G, C): its sum over G is the content, which alone is projected, and
    its mean over C the group marginal. With `essl_code` (ESSL) a third input's transformation is predicted.
    Raises ValueError if the features do not divide into the bins.
    """

    def __init__(self, encoder: CifarResNet, *, n_classes: int, bins: int = 0, essl_code: str | None = None):
        super().__init__()
        features = encoder.n_features
        if bins and features % bins:
            raise ValueError(f"{features} features do not divide into {bins} bins")
        self.bins = bins
        self.base_network = encoder
        self.head = projection_head(features // bins if bins else features)
        self.heads = nn.ModuleDict({"linear_classifier": nn.Linear(features, n_classes)})
        if essl_code is not None:
            self.predictor_essl = essl_predictor(features, CLASSES.get(essl_code, 1))

    def forward(self, view1: Tensor, view2: Tensor, essl_input: Tensor | None = None) -> Outputs:
        """Views (B, C, H, W), around 0; each goes through the encoder in a pass of its own, with its own batch statistics."""
        z1, z2 = self.base_network(view1), self.base_network(view2)
        essl_logits = None if essl_input is None else self.predictor_essl(self.base_network(essl_input))
        return self.outputs(z1, z2, essl_logits)

    def forward_jointly(self, view1: Tensor, view2: Tensor, essl_input: Tensor | None = None) -> Outputs:
        """The same with both views in one pass through the encoder, and common batch statistics."""
        z1, z2 = self.base_network(torch.cat([view1, view2])).chunk(2)
        essl_logits = None if essl_input is None else self.predictor_essl(self.base_network(essl_input))
        return self.outputs(z1, z2, essl_logits)

    def outputs(self, z1: Tensor, z2: Tensor, essl_logits: Tensor | None = None) -> Outputs:
        """What the heads say of representations (B, F)."""
        embedding1, embedding2 = self.head(content(z1, self.bins)), self.head(content(z2, self.bins))
        return Outputs(z1, z2, embedding1, embedding2, self.heads["linear_classifier"](z1.detach()), essl_logits)


def joint(z: Tensor, bins: int) -> Tensor:
    """Representations (B, F) as matrices (B, G, C), G = bins."""
    return z.unflatten(1, (bins, -1))


def content(z: Tensor, bins: int) -> Tensor:
    """The part of representations that says what is seen, however it is transformed: (B, F) -> (B, C), the sum over bins."""
    return joint(z, bins).sum(1) if bins else z


def group_marginal(z: Tensor, bins: int) -> Tensor:
    """The distribution over the bins of the structure axis that representations (B, F) stand for: (B, G)."""
    return joint(z, bins).mean(-1).softmax(-1)


def projection_head(features: int) -> nn.Sequential:
    """SimCLR's projection: two hidden layers, batch norm after each layer and at the end."""
    return nn.Sequential(
        nn.Linear(features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, EMBEDDING), nn.BatchNorm1d(EMBEDDING),
    )  # fmt: skip


def essl_predictor(features: int, n_outputs: int) -> nn.Sequential:
    """ESSL's predictor of the transformation: two hidden layers with layer norm."""
    return nn.Sequential(
        nn.Linear(features, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, n_outputs),
    )  # fmt: skip


def read_saved(path: str | Path) -> dict[str, Any]:
    """A saved model: `model` (a state dict), `encoder` and `options`. Runs no code in it. Raises InputError if it is none."""
    state = checkpoint.read(path)
    parts = ("model", "encoder", "options")
    if not isinstance(state, dict) or not all(isinstance(state.get(part), dict) for part in parts):
        raise InputError(f"{path} is no encoder saved by train_ssl.py")
    return state


def load_encoder(path: str | Path) -> CifarResNet:
    """The encoder of a saved model, on the CPU, ready for use (in evaluation mode). Raises InputError if there is none."""
    return encoder_of(read_saved(path), path)


def encoder_of(state: dict[str, Any], path: str | Path) -> CifarResNet:
    """The encoder of a saved model that `read_saved` has read. Raises InputError if there is none."""
    try:
        encoder = CifarResNet(**state["encoder"])
        prefix = "base_network."
        weights = {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}
        encoder.load_state_dict(weights)
    except Exception as error:  # damaged ones fail in many ways
        raise InputError(f"{path} is damaged: its encoder does not fit ({type(error).__name__})") from None
    if not all(parameter.isfinite().all() for parameter in encoder.parameters()):
        raise InputError(f"{path} has weights that are not finite")
    return encoder.eval()
