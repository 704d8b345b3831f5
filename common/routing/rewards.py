"""Rewards of whole trajectories, from the loss (final), and of single actions (per action).

Final rewards map (loss (B), estimates (B, ...), targets) to (B). Per-action rewards are told the actions of their decision
layer (`register`) and map distributions (N, K), actions (N) to (N) (`get_reward`). They keep their statistics in buffers, which
are saved with the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- final ---------------------------------------------------------------------------------------------------------------


class NegLossReward(nn.Module):
    """The negative loss of each sample."""

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
        return -loss.detach()


class CorrectClassifiedReward(nn.Module):
    """+1 for a sample whose largest estimate is its class, -1 otherwise; targets are indices or one-hot."""

    def forward(self, loss: Tensor, yest: Tensor, ytrue: Tensor | None) -> Tensor:
        if ytrue is None:
            raise ValueError("CorrectClassifiedReward needs targets: ystrue is None")
        classes = ytrue.argmax(1) if ytrue.ndim == yest.ndim else ytrue
        right = (yest.argmax(1) == classes).flatten(1).all(1) if classes.ndim > 1 else yest.argmax(1) == classes
        return 2 * right.to(loss.dtype) - 1


# ---- per action ----------------------------------------------------------------------------------------------------------


class PerActionBaseReward(nn.Module):
    """No reward for an action; remembers nothing. Layers that share a reward may have up to `num_actions` selections."""

    def __init__(self, num_actions: int | None = None):
        super().__init__()
        self.num_actions = num_actions

    def bind(self, num_selections: int) -> None:
        """Called by each layer that uses the reward. Raises ValueError if the layer has more selections than `num_actions`."""
        if self.num_actions is not None and num_selections > self.num_actions:
            raise ValueError(f"num_actions is {self.num_actions}: the layer has {num_selections} selections")

    def register(self, dist: Tensor, action: Tensor) -> None:
        """Note the actions (N) of a batch, drawn from distributions (N, K)."""

    def clear(self) -> None:
        """Forget all actions."""

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        """Rewards (N) of actions (N)."""
        return dist.new_zeros(len(action))


def check_history(history_len: int) -> None:
    """Raises ValueError for a history without actions."""
    if history_len < 1:
        raise ValueError(f"history_len is {history_len}: at least 1")


class CollaborationReward(PerActionBaseReward):
    """`reward_ratio` times the frequency of an action among the last `history_len` of its layer (Rosenbaum et al. 2018, 3.2).

    It rewards agents for the choices of others, so that modules are shared. Actions of all agents are counted, this batch's
    included; the paper has their probabilities instead.

    >>> reward = CollaborationReward(0.5, history_len=4)
    >>> reward.register(torch.full((5, 2), 0.5), torch.tensor([0, 0, 0, 1, 1]))  # the first is forgotten
    >>> reward.get_reward(torch.full((2, 2), 0.5), torch.tensor([0, 1]))
    tensor([0.2500, 0.2500])
    """

    history: Tensor

    def __init__(self, reward_ratio: float = 0.1, num_actions: int | None = None, history_len: int = 256):
        super().__init__(num_actions)
        check_history(history_len)
        self.reward_ratio = reward_ratio
        self.register_buffer("history", torch.full((history_len,), -1))  # -1: nothing yet

    def register(self, dist: Tensor, action: Tensor) -> None:
        self.history = torch.cat([self.history, action])[-len(self.history) :]

    def clear(self) -> None:
        self.history.fill_(-1)

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        K = dist.shape[1]
        places = self.history.clamp(max=K) + 1  # 0: nothing yet, K + 1: selections of a wider layer that shares the reward
        counts = places.new_zeros(K + 2).scatter_add(0, places, torch.ones_like(places))[1:].to(dist.dtype)
        return self.reward_ratio * (counts / counts.sum().clamp(min=1))[action]


class RunningAverageCollaborationReward(PerActionBaseReward):
    """Like CollaborationReward, with a running average of decay 10^(-1/history_len) instead of a window.

    The average starts with the first action; a tenth of a weight is left after `history_len` actions.
    """

    average: Tensor

    def __init__(self, reward_ratio: float = 0.1, num_actions: int | None = None, history_len: int = 256):
        super().__init__(num_actions)
        check_history(history_len)
        self.reward_ratio, self.decay = reward_ratio, 10 ** (-1 / history_len)
        self.register_buffer("average", torch.zeros(num_actions or 0))  # sums to 1, or to 0 before the first action

    def bind(self, num_selections: int) -> None:
        super().bind(num_selections)
        self.average = F.pad(self.average, (0, max(0, num_selections - len(self.average))))

    def register(self, dist: Tensor, action: Tensor) -> None:
        n = len(action)
        weights = self.decay ** torch.arange(n - 1, -1, -1, device=action.device, dtype=self.average.dtype)
        is_first = (self.average.sum() == 0) & (torch.arange(n, device=action.device) == 0)
        weights = weights * torch.where(is_first, 1.0, 1 - self.decay)  # the first action enters with the full weight
        self.average = self.decay**n * self.average + torch.zeros_like(self.average).index_add(0, action, weights)

    def clear(self) -> None:
        self.average = torch.zeros_like(self.average)

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        return self.reward_ratio * self.average[action]


class ManualReward(PerActionBaseReward):
    """A reward for each action from a table (K), to make modules expensive or cheap."""

    rewards: Tensor

    def __init__(self, rewards: Sequence[float] | Tensor):
        super().__init__()
        self.register_buffer("rewards", torch.as_tensor(rewards, dtype=torch.get_default_dtype()))

    def bind(self, num_selections: int) -> None:
        if len(self.rewards) != num_selections:
            raise ValueError(f"rewards has {len(self.rewards)} entries, num_selections is {num_selections}")

    def get_reward(self, dist: Tensor, action: Tensor) -> Tensor:
        return self.rewards[action]
