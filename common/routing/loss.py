"""From losses of samples to rewards of decisions, and from those to the loss of the routers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.routing.decision import Transition
from common.routing.rewards import refuse_unknown
from common.routing.trajectories import Step, Trajectories


class Loss(nn.Module):
    """The loss of the modules, and that of the decisions that led there.

        module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, targets, records)
        (module_loss + routing_loss).backward()

    Rewards of a sample with n decisions: each decision's per-action reward (and `records.add_rewards`) / n, times |final
    reward| with `normalize_per_action_rewards`; the last decision's also the final reward. Returns are discounted by
    `discounting`. With `clear`, the layers forget their actions after each batch.
    """

    def __init__(
        self,
        pytorch_loss_func: nn.Module,
        routing_reward_func: nn.Module,
        discounting: float = 1.0,
        clear: bool = False,
        normalize_per_action_rewards: bool = True,
        **unknown: Any,
    ):
        super().__init__()
        refuse_unknown(unknown, "Loss")
        if not hasattr(pytorch_loss_func, "reduction"):
            raise ValueError(f"pytorch_loss_func is {pytorch_loss_func!r}: a loss module of torch with a reduction is needed")
        if not 0 <= discounting <= 1:
            raise ValueError(f"discounting is {discounting}: from 0 to 1")
        self.loss_func = copy.copy(pytorch_loss_func)  # the caller's own keeps its reduction
        vars(self.loss_func)["reduction"] = "none"
        self.reward_func, self.discounting, self.clear = routing_reward_func, discounting, clear
        self.normalize_per_action_rewards = normalize_per_action_rewards

    def forward(
        self,
        ysest: Tensor,
        records: Trajectories | Tensor,
        ystrue: Tensor | Trajectories | None = None,
        external_losses: Tensor | None = None,
        reduce: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Mean module loss and mean routing loss or, without `reduce`, both for each sample (B).

        Trajectories and targets may come in either order. `external_losses` (B, ...) stand in for the loss of the estimates.
        Raises ValueError for targets that are missing and rewards that are not finite.
        """
        if isinstance(ystrue, Trajectories):
            records, ystrue = ystrue, records
        if not isinstance(records, Trajectories) or isinstance(ystrue, Trajectories):
            raise ValueError(f"records is a {type(records).__name__}: trajectories are needed, as Initialization makes them")
        if external_losses is None and ystrue is None:
            raise ValueError("ystrue is None: targets, or external_losses, are needed")
        losses = self.loss_func(ysest, ystrue) if external_losses is None else external_losses
        module_loss = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
        final = self.reward_func(module_loss, ysest, ystrue)
        if not final.isfinite().all():
            raise ValueError(f"the final rewards hold {final[~final.isfinite()][0].item()}: the loss has no finite value")
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
        """Rewards, returns, and discounted values of the next states, (T, B) each; 0 where a sample took no part.

        Values are looked up if a decision bootstraps; where the next one knows none, the return from there stands in.
        """
        active = records.active()
        per_action = torch.stack([self._per_action(step) for step in records.steps])
        if records.add_rewards is not None:
            per_action = per_action + records.add_rewards
        per_action = per_action / active.sum(0).clamp(min=1)
        if self.normalize_per_action_rewards:
            per_action = per_action * final.abs()
        rewards, returns, next_values = (torch.zeros_like(per_action) for _ in range(3))
        is_last = torch.ones_like(active[0])  # of the decisions that a sample still took part in
        cum_return, value = torch.zeros_like(final), torch.zeros_like(final)  # from the next decision on; of its state
        for t in reversed(range(len(records.steps))):
            step, here = records.steps[t], active[t]
            next_values[t] = self.discounting * value * here
            rewards[t] = torch.where(is_last, per_action[t] + final, per_action[t]) * here
            cum_return = torch.where(here, rewards[t] + self.discounting * cum_return, cum_return)
            returns[t] = cum_return * here
            if any(earlier.decision.bootstraps for earlier in records.steps[:t]):
                known = step.decision.bootstrap(step.states, step.actions)
                value = torch.where(here, cum_return if known is None else known, value)
            is_last = is_last & ~here
        return rewards, returns, next_values

    @staticmethod
    def _per_action(step: Step) -> Tensor:
        """Per-action rewards of a step, (B), before they are weighted."""
        return step.decision.reward_func.get_reward(step.states[:, :, 0], step.actions)
