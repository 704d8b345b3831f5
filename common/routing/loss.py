"""The losses of modules and routers: from losses of samples to rewards of decisions, and from these to the routing loss."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from common.routing.decision import Step, Trajectories, Transition


class NonFiniteLossError(ValueError):
    """A loss, and so a reward, that is not finite."""


class Loss(nn.Module):
    """The loss of the modules, and the loss of the decisions.

        module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, targets, records)
        (module_loss + routing_loss).backward()

    For a sample with n decisions, the reward of a decision is its per-action reward (plus `records.add_rewards`) / n, times
    |final reward| with `normalize_per_action_rewards`; the last decision gets the final reward, too. Returns are sums of the
    rewards from a decision on. With `clear`, the layers forget their actions after each batch.
    """

    def __init__(
        self,
        pytorch_loss_func: nn.Module,
        routing_reward_func: nn.Module,
        clear: bool = False,
        normalize_per_action_rewards: bool = True,
    ):
        super().__init__()
        if not hasattr(pytorch_loss_func, "reduction"):
            raise ValueError(f"pytorch_loss_func is {pytorch_loss_func!r}: a loss module of torch with a reduction is needed")
        self.loss_func = copy.copy(pytorch_loss_func)  # the caller's own keeps its reduction
        vars(self.loss_func)["reduction"] = "none"
        self.reward_func, self.clear = routing_reward_func, clear
        self.normalize_per_action_rewards = normalize_per_action_rewards

    def forward(
        self,
        ysest: Tensor,
        ystrue: Tensor | None,
        records: Trajectories,
        external_losses: Tensor | None = None,
        reduce: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Mean module loss and mean routing loss or, without `reduce`, both for each sample (B).

        `external_losses` (B, ...) replace the loss of the estimates. Raises ValueError for targets that are missing,
        another number of losses than of trajectories, and, on CPUs, rewards that are not finite.
        """
        if not isinstance(records, Trajectories):
            raise ValueError(f"records is a {type(records).__name__}: trajectories are needed, as Initialization makes them")
        if external_losses is None and ystrue is None:
            raise ValueError("ystrue is None: targets, or external_losses, are needed")
        losses = self.loss_func(ysest, ystrue) if external_losses is None else external_losses
        module_loss = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
        if len(module_loss) != len(records):
            raise ValueError(f"records are of {len(records)} samples: the batch has {len(module_loss)} losses")
        final = self.reward_func(module_loss, ysest, ystrue)
        if final.device.type == "cpu" and not final.isfinite().all():  # the host would wait for a GPU
            raise NonFiniteLossError(
                f"the final rewards hold {final[~final.isfinite()][0].item()}: the loss has no finite value"
            )
        routing_loss = self.routing_loss(records, final)
        return (module_loss.mean(), routing_loss.mean()) if reduce else (module_loss, routing_loss)

    def routing_loss(self, records: Trajectories, final: Tensor) -> Tensor:
        """The sum of each sample's decisions' losses, (B), given final rewards (B)."""
        total = torch.zeros_like(final)
        if not records.steps:
            return total
        rewards, returns, next_values = self.rewards(records, final)
        for step, reward, cum_return, next_value in zip(records.steps, rewards, returns, next_values, strict=True):
            transition = Transition(step.states, step.actions, reward, cum_return, next_value, step.control)
            loss = step.decision.loss(transition)
            total = total + loss.where(step.active, 0.0)
        if self.clear:
            for step in records.steps:
                step.decision.reward_func.clear()
        return total

    @torch.no_grad()
    def rewards(self, records: Trajectories, final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, returns, and values of the next states, (T, B) each; 0 for inactive samples.

        Values are computed if an earlier decision bootstraps; where a decision has none, its return is used instead.
        """
        active = records.active()
        per_action = torch.stack([self._per_action(step) for step in records.steps])
        if records.add_rewards is not None:
            per_action = per_action + records.add_rewards
        per_action = per_action / active.sum(0).clamp(min=1)
        if self.normalize_per_action_rewards:
            per_action = per_action * final.abs()
        rewards, returns, next_values = [], [], []  # of the last step first
        is_last = torch.ones_like(active[0])  # no later decision of the sample is active
        cum_return, value = torch.zeros_like(final), torch.zeros_like(final)  # of the next decision
        for t in reversed(range(len(records.steps))):
            step, here = records.steps[t], active[t]
            next_values.append(value * here)
            rewards.append(torch.where(is_last, per_action[t] + final, per_action[t]) * here)
            cum_return = torch.where(here, rewards[-1] + cum_return, cum_return)
            returns.append(cum_return * here)
            if any(earlier.decision.bootstraps for earlier in records.steps[:t]):
                known = step.decision.bootstrap(step.states, step.actions)
                value = torch.where(here, cum_return if known is None else known, value)
            is_last = is_last & ~here
        return torch.stack(rewards[::-1]), torch.stack(returns[::-1]), torch.stack(next_values[::-1])

    @staticmethod
    def _per_action(step: Step) -> Tensor:
        """Per-action rewards of a step, (B), before they are weighted."""
        return step.decision.reward_func.get_reward(step.states[:, :, 0], step.actions)
