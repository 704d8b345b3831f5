"""The losses of SimCLR, DUET and ESSL: functions of what the network says to scalars; none of them knows a network.

SimCLR: Chen et al. 2020; DUET: Suau et al. 2023, equations 4 to 6; ESSL: Dangovski et al. 2022, equation 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common.ssl.targets import TARGETS

TEMPERATURE = 0.1
MASKED = 1e9  # taken off the similarity of a view with itself
VALUE_CODES = ("rot", "bri", "con", "sat", "hue")  # ESSL predicts a number; of others, a class


def contrastive_logits(embedding1: Tensor, embedding2: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Similarities of each view with all others over the temperature, the right one on the diagonal: two of (B, 2B)."""
    a, b = (e * e.square().sum(1, keepdim=True).clamp(min=1e-12).rsqrt() for e in (embedding1, embedding2))
    itself = MASKED * torch.eye(len(a), device=a.device)
    across = a @ b.T / temperature
    of_a = torch.cat([across, a @ a.T / temperature - itself], 1)
    of_b = torch.cat([across.T, b @ b.T / temperature - itself], 1)
    return of_a, of_b


def nt_xent(embedding1: Tensor, embedding2: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Cross entropy of finding an image's other view among all others, both directions added: (B, D) twice -> (B)."""
    return _nt_xent(*contrastive_logits(embedding1, embedding2, temperature))


def _nt_xent(of_a: Tensor, of_b: Tensor) -> Tensor:
    right = torch.arange(len(of_a), device=of_a.device)
    return F.cross_entropy(of_a, right, reduction="none") + F.cross_entropy(of_b, right, reduction="none")


def jensen_shannon(logits: Tensor, targets: Tensor) -> Tensor:
    """Divergence (nats) between softmax(logits) and targets (..., G), mean over all rows.

    Everything stays in logarithms, so neither an empty bin nor a large gap of logits gives NaN.
    """
    log_p, log_q = logits.log_softmax(-1), targets.log()
    log_mean = torch.logaddexp(log_p, log_q) - torch.tensor(2.0).log()
    of_p = (log_p.exp() * (log_p - log_mean)).sum(-1)
    of_q = (torch.xlogy(targets, targets) - targets * log_mean).sum(-1)
    return 0.5 * (of_p + of_q).mean()


def top_k(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Percent of rows whose label is among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return 100 * (best == labels[:, None]).any(1).float().mean()


def simclr_loss(embedding1: Tensor, embedding2: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent of two views' embeddings (B, D), and what is logged beside it: percentages of views found again."""
    of_a, of_b = contrastive_logits(embedding1, embedding2)
    loss = _nt_xent(of_a, of_b).mean()
    figures = {"loss_mean": loss}
    right = torch.arange(len(embedding1), device=embedding1.device)
    for k in (1, 5) if len(embedding1) > 5 else (1,):
        found_a, found_b = top_k(of_a, right, k), top_k(of_b, right, k)
        figures[f"ntxent_ABAA_top{k}_mean"], figures[f"ntxent_BABB_top{k}_mean"] = found_a, found_b
        figures[f"ntxent_total_top{k}_mean"] = (found_a + found_b) / 2
    return loss, figures


def duet_loss(
    embedding1: Tensor,
    embedding2: Tensor,
    joint1: Tensor,
    joint2: Tensor,
    parameter1: Tensor,
    parameter2: Tensor,
    *,
    target: str,
    weight: float,
    training: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent of the content, plus `weight` times the divergence of the group marginals from their targets.

    `joint` (B, G, C) are representations as matrices, `parameter` (B, 1) the transformations' parameters; the logit of a bin is
    its mean over C. In training both views count, otherwise (when view 1 is not transformed) the second alone.
    """
    nce = nt_xent(embedding1, embedding2).mean()
    joints, parameters = ([joint1, joint2], [parameter1, parameter2]) if training else ([joint2], [parameter2])
    marginals = torch.cat(joints).mean(-1)  # (2B, G)
    targets = TARGETS[target](torch.cat(parameters)[:, 0], marginals.shape[1])
    divergence = jensen_shannon(marginals, targets)
    loss = nce + weight * divergence
    return loss, {
        "loss_mean": loss,
        "nce_loss_mean": nce,
        "group_loss_mean": weight * divergence,
        "group_0_loss_mean": divergence,
    }


def essl_loss(
    embedding1: Tensor, embedding2: Tensor, logits: Tensor, labels: Tensor, *, code: str, weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """NT-Xent plus `weight` times the loss of predicting the transformation.

    `logits` are numbers (N, 1), with squared error, or of classes (N, classes), with cross entropy.
    """
    nce = nt_xent(embedding1, embedding2).mean()
    is_value = code in VALUE_CODES
    prediction = F.mse_loss(logits, labels) if is_value else F.cross_entropy(logits, labels)
    loss = nce + weight * prediction
    figures = {"loss_mean": loss, "nce_loss_mean": nce, "essl_loss_mean": prediction}
    if not is_value:
        figures |= {f"essl_top_{k}_mean": top_k(logits, labels, k) for k in (1, 5)}
    return loss, figures


def classification_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy of a linear classifier (B, classes), and its top-1 and top-5 accuracy in percent."""
    loss = F.cross_entropy(logits, labels)
    return loss, {"loss_mean": loss} | {f"top_{k}_mean": top_k(logits, labels, k) for k in (1, 5)}
