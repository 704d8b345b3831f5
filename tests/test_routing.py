"""Routing networks: every defect of the original that is mended, bad input, and that each decision learns a bandit."""

import copy
import doctest
import importlib
import re
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn, optim

import common.routing as R
from common.models import routed
from common.routing import (
    MLP,
    CollaborationReward,
    CorrectClassifiedReward,
    Initialization,
    Loss,
    ManualReward,
    NegLossReward,
    RoutedLSTMCell,
    Selection,
    grouped,
    policies,
)
from common.routing.decision import Transition, draw
from tests.reference import DATA, assert_agrees

POLICY = (
    "REINFORCE",
    "EGreedyREINFORCE",
    "REINFORCEBl1",
    "REINFORCEBl2",
    "ActorCritic",
    "AAC",
    "BootstrapAAC",
    "EGreedyAAC",
    "WPL",
)
VALUE = ("QLearning", "SARSA", "AdvantageLearning", "BootstrapAdvantageLearning")
KINDS = (*POLICY, *VALUE, "GumbelSoftmax", "RELAX")


def start(n: int = 9, tasks: Tensor | tuple = (), seed: int = 0) -> tuple[Tensor, R.Trajectories]:
    xs, records, _ = Initialization()(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)), tasks)
    return xs, records


# ---- every kind learns ---------------------------------------------------------------------------------------------------

N_ACTIONS, N_DECISIONS, RIGHT = 3, 3, (2, 0, 1)
N_FEATURES = 1 + N_ACTIONS * N_DECISIONS  # a constant, and a mark for each selection of each decision


class Mark(nn.Module):
    """Marks in the input that it went through this module."""

    def __init__(self, place: int):
        super().__init__()
        self.mark = torch.eye(N_FEATURES)[place]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mark


def share_right(kind: str, storage: str, reward: nn.Module, seeds: int = 6, samples: int = 32) -> Tensor:
    """Three decisions of three actions, one of which is right; the share that is after 150 steps, of each seed.

    Seeds are agents of their own: they share nothing but the calls. A table that learns from one-step targets alone needs an
    agent for each history of actions.
    """
    torch.manual_seed(1)
    layer = getattr(R, kind)
    by_history = layer.bootstraps and storage == "tabular" and kind != "ActorCritic"  # whose policy learns from returns
    options = {"scale": "output"} if kind == "GumbelSoftmax" else {"exploration": 0.3} if kind in VALUE else {}
    decisions, selections = nn.ModuleList(), []
    for t in range(N_DECISIONS):
        n_agents = seeds * (N_ACTIONS**t if by_history else 1)
        decisions.append(layer(N_ACTIONS, N_FEATURES, n_agents, policy_storage_type=storage, **options))
        selections.append(Selection(*(Mark(1 + N_ACTIONS * t + k) for k in range(N_ACTIONS))))
    loss_func = Loss(nn.CrossEntropyLoss(), reward)
    optimizer = torch.optim.Adam(decisions.parameters(), 0.05, fused=True)
    places = torch.tensor([1 + N_ACTIONS * t + RIGHT[t] for t in range(N_DECISIONS)])

    def route() -> tuple[Tensor, R.Trajectories]:
        agents = torch.arange(seeds).repeat_interleave(samples)
        x, records, _ = Initialization()(torch.eye(N_FEATURES)[:1].repeat(len(agents), 1))
        for decision, selection in zip(decisions, selections, strict=True):
            x, records, actions = decision(x, records, agents)
            x, records, actions = selection(x, records, actions)
            agents = agents * N_ACTIONS + actions if by_history else agents
        return x, records

    for _ in range(150):
        x, records = route()
        # class 0 if all three are right; the more are, the smaller the loss
        estimates = torch.stack([x[:, places].sum(1) - 2.5, torch.zeros(len(x))], 1)
        module_loss, routing_loss = loss_func(estimates, torch.zeros(len(x), dtype=torch.int64), records)
        optimizer.zero_grad()
        (module_loss + routing_loss).backward()
        optimizer.step()
    decisions.eval()
    right = route()[1].actions() == torch.tensor(RIGHT)[:, None]
    return right.float().mean(0).view(seeds, samples).mean(1)


@pytest.mark.parametrize("storage", ["tabular", "approx"])
@pytest.mark.parametrize("kind", KINDS)
def test_bandit(kind: str, storage: str) -> None:
    """Chance is 1/3."""
    shares = share_right(kind, storage, NegLossReward())
    assert shares.median() >= 0.95, shares


@pytest.mark.parametrize("kind", ["WPL", "QLearning"])
def test_bandit_with_rewards_of_one(kind: str) -> None:
    """+1 for three right decisions, -1 else."""
    assert share_right(kind, "tabular", CorrectClassifiedReward()).median() >= 0.95


# ---- losses --------------------------------------------------------------------------------------------------------------


def transition(channels: int, seed: int = 0, n: int = 7, k: int = 4) -> Transition:
    gen = torch.Generator().manual_seed(seed)
    state = torch.randn(n, k, channels, generator=gen)
    state[:, :, 0] = state[:, :, 0].log_softmax(1)
    action = torch.randint(0, k, (n,), generator=gen)
    reward, cum_return, next_value = torch.randn(3, n, generator=gen)
    return Transition(state.requires_grad_(), action, reward, cum_return, next_value)


def test_targets() -> None:
    """r + V' where the original has V' - r; every loss by hand, sample by sample."""
    t = transition(2)
    for i in range(7):
        q, r, v = t.state[i, t.action[i], 0], t.reward[i], t.next_value[i]
        for kind in ("QLearning", "SARSA"):
            assert_agrees(getattr(R, kind)(4, 6).loss(t)[i], (q - (r + v)) ** 2, 1e-5, kind)
        log_p, value = t.state[i, t.action[i], 0], t.state[i, t.action[i], 1]
        baseline = (t.state[i, :, 0].exp() * t.state[i, :, 1]).sum()
        expected = -log_p * (t.cum_return[i] - baseline) + (value - (r + v)) ** 2
        assert_agrees(R.ActorCritic(4, 6).loss(t)[i], expected, 1e-5)
    # what the next state is worth: the best action's value, that of the action taken, the policy's mean
    known = {kind: getattr(R, kind)(4, 6).bootstrap(t.state, t.action) for kind in ("QLearning", "SARSA", "ActorCritic")}
    assert torch.equal(known["QLearning"], t.state[:, :, 0].max(1).values)
    assert torch.equal(known["SARSA"], t.state[torch.arange(7), t.action, 0])
    assert_agrees(known["ActorCritic"], (t.state[:, :, 0].exp() * t.state[:, :, 1]).sum(1), 1e-5)
    # the last per-action reward counts
    _, records = start()
    layer = R.QLearning(4, 6, additional_reward_func=ManualReward([0.5] * 4))
    layer(torch.randn(9, 6), records)
    rewards, returns, next_values = Loss(nn.MSELoss(), NegLossReward()).rewards(records, torch.full((9,), -2.0))
    assert torch.equal(rewards, torch.full((1, 9), -1.0)) and torch.equal(returns, rewards) and not next_values.any()


def test_baselines() -> None:
    """sum p Q is taken off the return, without a gradient; values are trained on the return; weights are bounded."""
    t = transition(2)
    p, q = t.state[:, :, 0].exp(), t.state[:, :, 1]
    row = torch.arange(7)
    advantage, value = t.cum_return - (p * q).sum(1), (q[row, t.action] - t.cum_return) ** 2
    log_p = t.state[row, t.action, 0]
    assert_agrees(R.REINFORCEBl1(4, 6).loss(t), -log_p * advantage + value, 1e-5)
    weight = (1 / (4 * p[row, t.action])).clamp(max=10)
    assert_agrees(R.REINFORCEBl2(4, 6).loss(t), -log_p * weight * advantage + value, 1e-5)
    R.REINFORCEBl1(4, 6).loss(t).sum().backward()
    taken = torch.nn.functional.one_hot(t.action, 4)
    assert_agrees(t.state.grad[:, :, 0], -advantage.detach()[:, None] * taken, 1e-5)
    assert_agrees(t.state.grad[:, :, 1], 2 * (q - t.cum_return[:, None]).detach() * taken, 1e-5)
    rare = torch.tensor([[[-20.0, 0.0], [0.0, 0.0]]])
    one = torch.ones(1)
    assert R.REINFORCEBl2(2, 6).loss(Transition(rare, torch.tensor([0]), one, one, one)).item() == 20 * 10 + 1


def test_wpl() -> None:
    """Better than expected raises the probability, by less the nearer it is to 1; worse lowers it, by less near 0."""
    log_p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]).log()
    state = torch.stack([log_p, torch.zeros(4, 2)], 2).requires_grad_()
    zero = torch.zeros(4, dtype=torch.int64)
    returns = torch.tensor([1.0, -1.0, 1.0, -1.0])
    R.WPL(2, 6).loss(Transition(state, zero, returns, returns, torch.zeros(4))).sum().backward()
    assert_agrees(-state.grad[:, 0, 0], torch.tensor([0.1, -0.9, 0.9, -0.1]), 1e-5)


def test_sampling_of_egreedy() -> None:
    """The stored distribution is the true one: e p + (1 - e) [greedy]; so are the draws."""
    for kind, exploration in (("EGreedyREINFORCE", 0.1), ("EGreedyAAC", 0.5)):
        layer = getattr(R, kind)(3, policy_storage_type="tabular", exploration=exploration)
        p = torch.tensor([0.7, 0.2, 0.1])
        layer.policy.load_state_dict({"table": p.log()[None]})
        torch.manual_seed(0)
        batch, records = start(20_000)
        _, _, actions = layer(batch, records)
        expected = exploration * p + (1 - exploration) * torch.tensor([1.0, 0.0, 0.0])
        assert_agrees(records.steps[0].states[0, :, 2], expected, 1e-5)
        assert (torch.bincount(actions, minlength=3) / 20_000 - expected).abs().max() < 0.01
        assert torch.equal(records.steps[0].is_exploratory, actions != 0)


@pytest.mark.parametrize("kind", KINDS)
def test_is_exploratory(kind: str) -> None:
    """In training some actions are not greedy, and are called so; in evaluation none, and nothing random is drawn."""
    torch.manual_seed(0)
    layer = getattr(R, kind)(4, 6, exploration=0.5)
    batch, records = start(200)
    layer(batch, records)
    step = records.steps[0]
    assert torch.equal(step.is_exploratory, step.actions != step.states[:, :, 0].argmax(1)) and step.is_exploratory.any()
    layer.eval()
    before = torch.get_rng_state()
    layer(batch, records)
    assert not records.steps[1].is_exploratory.any() and torch.equal(before, torch.get_rng_state())


def test_fixed_decisions() -> None:
    """They make no step, so that the routing loss is 0, not an error."""
    xs, records = start(4, torch.tensor([2, 0, 1, 1]))
    for layer, expected in ((R.PerTaskAssignment(), [2, 0, 1, 1]), (R.PassThrough(), [0, 0, 0, 0])):
        _, records, actions = layer(xs, records, [])
        assert actions.tolist() == expected and not records.steps and not list(layer.parameters())
    estimates = torch.randn(4, 3, requires_grad=True)
    module_loss, routing_loss = Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, torch.tensor([0, 1, 2, 0]), records)
    assert routing_loss.item() == 0
    assert module_loss.item() == pytest.approx(nn.CrossEntropyLoss()(estimates, torch.tensor([0, 1, 2, 0])).item())


# ---- rewards -------------------------------------------------------------------------------------------------------------


def test_rewards_of_layers() -> None:
    """Each layer has its own; evaluation does not enter it; it is saved with the layer."""
    a, b = (R.REINFORCE(4, 6, additional_reward_class=CollaborationReward) for _ in range(2))
    assert a.reward_func is not b.reward_func
    xs, records = start()
    a(xs, records)
    assert (a.reward_func.history >= 0).sum() == 9 and not (b.reward_func.history >= 0).any()
    before = a.reward_func.history.clone()
    a.eval()(xs, records)
    assert torch.equal(a.reward_func.history, before)
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.reward_func.history, before)
    average = R.WPL(4, 6, additional_reward_func=R.RunningAverageCollaborationReward(0.3))
    average(xs, records)
    other = R.WPL(4, 6, additional_reward_func=R.RunningAverageCollaborationReward(0.3))
    other.load_state_dict(average.state_dict())
    assert other.reward_func.average.sum() == pytest.approx(1) and torch.equal(
        other.reward_func.average, average.reward_func.average
    )
    average.reward_func.clear()
    assert not average.reward_func.get_reward(torch.zeros(2, 4), torch.tensor([0, 1])).any()


def test_rewards_by_hand() -> None:
    xs, records = start(5)
    layers = [R.QLearning(4, 6, additional_reward_func=ManualReward([0.3, 0.6, 0.9, 1.2])) for _ in range(3)]
    for layer in layers:
        layer(xs, records)
    rewards, returns, next_values = Loss(nn.MSELoss(), NegLossReward()).rewards(records, torch.full((5,), -2.0))
    per_action = torch.tensor([0.3, 0.6, 0.9, 1.2])[records.actions()] * 2 / 3
    assert_agrees(rewards, per_action + torch.tensor([0, 0, -2.0])[:, None], 1e-5)
    assert_agrees(returns[0], rewards.sum(0), 1e-5)
    for t in (0, 1):
        assert_agrees(next_values[t], records.steps[t + 1].states[:, :, 0].max(1).values, 1e-5)
    losses, targets = torch.ones(2), torch.tensor([0, 1])
    assert NegLossReward()(losses, torch.eye(2), targets).tolist() == [-1, -1]
    assert CorrectClassifiedReward()(losses, torch.eye(2), 1 - targets).tolist() == [-1, -1]
    assert CorrectClassifiedReward()(losses, torch.eye(2), torch.eye(2)).tolist() == [1, 1]


def test_shared_rewards() -> None:
    """One reward for layers of different widths keeps the caller's number of actions, or grows to the larger one."""
    for num_actions in (5, None):
        for widths in ((5, 3), (3, 5)):
            reward = R.RunningAverageCollaborationReward(0.3, num_actions=num_actions)
            layers = [R.REINFORCE(n, 6, additional_reward_func=reward) for n in widths]
            assert reward.num_actions == num_actions and len(reward.average) == 5
            for layer in layers:
                xs, records = start()
                layer(xs, records)
            assert reward.average.sum() == pytest.approx(1)
            assert reward.get_reward(torch.zeros(1, 5), torch.tensor([4])).shape == (1,)


def test_collaboration_of_layers_that_share() -> None:
    """Actions of a wider layer are counted in all, and a history that is not full has only its own."""
    reward = CollaborationReward(0.5, history_len=8)
    reward.register(torch.zeros(6, 5), torch.tensor([0, 4, 1, 4, 0, 3]))
    actions = torch.tensor([0, 1, 2, 0])
    assert_agrees(reward.get_reward(torch.zeros(4, 3), actions), 0.5 * torch.tensor([2.0, 1, 0, 2]) / 6, 1e-6)
    reward.clear()
    assert not reward.get_reward(torch.zeros(4, 3), actions).any()


def test_draws() -> None:
    """They are those of torch.multinomial, and leave its random state."""
    p = torch.rand(1000, 7, generator=torch.Generator().manual_seed(0))
    p[:, 3] = 0
    torch.manual_seed(0)
    expected, after = p.multinomial(1)[:, 0], torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(draw(p), expected) and torch.equal(torch.get_rng_state(), after)


def test_bootstrap_over_widths() -> None:
    """The next state's value counts, whatever its width; where there is none, the return does; gaps are passed."""
    xs, records = start(6)
    mask = torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)
    layers = [R.QLearning(5, 6), R.QLearning(3, 6), R.REINFORCE(4, 6)]
    for layer, active in zip(layers, (None, mask, None), strict=True):
        layer(xs, records, mask=active)
    final = torch.arange(6.0)
    _, returns, next_values = Loss(nn.MSELoss(), NegLossReward()).rewards(records, final)
    assert torch.equal(next_values[0, :3], records.steps[1].states[:3, :, 0].max(1).values)
    assert torch.equal(next_values[0, 3:], final[3:]) and torch.equal(next_values[1, :3], final[:3])
    assert not next_values[1, 3:].any() and not next_values[2].any() and not returns[1, 3:].any()


def test_loss_of_sequences() -> None:
    """(B, C, T) estimates: summed over T, by sample. The caller's loss function stays what it was."""
    xs, records = start(4)
    R.REINFORCE(4, 6)(xs, records)
    estimates, targets = torch.randn(4, 3, 5), torch.randint(0, 3, (4, 5))
    own = nn.CrossEntropyLoss()
    module_loss, routing_loss = Loss(own, NegLossReward())(estimates, targets, records, reduce=False)
    expected = torch.stack([nn.functional.cross_entropy(e[None], t[None], reduction="sum") for e, t in zip(estimates, targets)])
    assert_agrees(module_loss, expected, 1e-5)
    assert routing_loss.shape == (4,) and own.reduction == "mean"


# ---- layers --------------------------------------------------------------------------------------------------------------


def test_selection() -> None:
    """Runs the selected modules, once each; in any type; a single module heeds the mask."""
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    selection = Selection(*(Counted(6, 6).double() for _ in range(3)))
    xs, records = start()
    actions = torch.tensor([0, 2, 2, 0, 2, 0, 0, 0, 2])
    ys, _, _ = selection(xs.double(), records, actions)
    assert calls == [5, 4] and ys.dtype == torch.float64
    for i, (x, a) in enumerate(zip(xs, actions, strict=True)):
        assert_agrees(ys[i], selection.selectable[a](x.double()[None])[0], 1e-9)
    mask = torch.arange(9) < 4
    single = Selection(nn.Linear(6, 6))
    out, _, _ = single(xs, records, torch.zeros(9, dtype=torch.int64), mask)
    assert not out[4:].any() and out[:4].all()


@pytest.mark.parametrize("index", [[0, 2, 1, 2, 0, 1, 3, 3, 2], [0, 0, 0, 0, 0, 0, 0, 4, 0], [1] * 9])
def test_stacked_linear(index: list[int]) -> None:
    """The same as a module for each, with its gradients: of groups that are alike, that are not, and of a single one."""
    layers = [nn.Linear(6, 4) for _ in range(5)]
    stack = R.StackedLinear(5, 6, 4)
    stack.load_state_dict(
        {name: torch.stack([getattr(layer, name).detach() for layer in layers]) for name in ("weight", "bias")}
    )
    results = []
    for selection in (Selection(*layers), Selection(stack)):
        xs, records = start()
        xs.requires_grad_()
        ys, _, _ = selection(xs, records, torch.tensor(index))
        ys.square().sum().backward()
        results.append((ys, xs.grad))
    for a, b in zip(*results, strict=True):
        assert_agrees(b, a.detach(), 1e-5)
    for k, layer in enumerate(layers):
        expected = torch.zeros(4, 6) if layer.weight.grad is None else layer.weight.grad
        assert_agrees(stack.weight.grad[k], expected, 1e-5)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All maps are applied to all samples."""
    for module in (grouped, policies):
        monkeypatch.setattr(module, "can_apply_all", lambda *_: True)


def outputs_and_gradients(layer: nn.Module, index: list[int]) -> list[Tensor]:
    """Of a layer for samples (N, 6) and their index: its output and all gradients, 0 where there is none."""
    layer.zero_grad()
    xs = torch.randn(len(index), 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = layer(xs, torch.tensor(index))
    out.square().sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in (xs, *layer.parameters())]
    return [out.detach(), *gradients]


@pytest.mark.parametrize("index", [[0, 2, 1, 2, 0, 1, 3, 3, 2], [0, 0, 0, 0, 0, 0, 0, 4, 0], [1] * 9, [3]])
@pytest.mark.parametrize("kind", ["maps", "networks", "deep networks"])
def test_all_maps_for_all_samples(kind: str, index: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of fixed size equals a call for each module: groups that are alike, that are not, empty ones, one sample."""
    torch.manual_seed(0)
    hidden = (8, 7) if kind == "deep networks" else ()
    layer = R.StackedLinear(5, 6, 4) if kind == "maps" else policies.Networks(5, 6, 4, hidden)
    by_group = outputs_and_gradients(layer, index)
    as_on_a_gpu(monkeypatch)
    for a, b in zip(by_group, outputs_and_gradients(layer, index), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_decisions_as_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several networks decide, with values and controls: the same draws, losses and gradients, second derivatives included."""
    torch.manual_seed(0)
    layer, selection = getattr(R, kind)(4, 6, num_agents=3, approx_hidden_dims=(8,)), Selection(R.StackedLinear(4, 6, 2))
    results = []
    for on_a_gpu in (False, True):
        if on_a_gpu:
            as_on_a_gpu(monkeypatch)
        torch.manual_seed(1)
        xs, records = start(20)
        ys, records, actions = selection(*layer(xs, records, torch.arange(20) % 3))
        sum(Loss(nn.MSELoss(), NegLossReward())(ys, torch.ones(20, 2), records)).backward()
        parameters = [*layer.parameters(), *selection.parameters()]
        gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
        results.append([actions, ys.detach(), *(g for g in gradients if g is not None)])
        layer.zero_grad()
        selection.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


DECIDING = [(model, kind) for model in ("routed-all-fc", "dispatched", "single-agent") for kind in KINDS]


@pytest.mark.parametrize("model, kind", [*DECIDING, *((model, "WPL") for model in ("per-task-1-fc", "soft-mixture"))])
def test_no_layer_looks_at_values(model: str, kind: str) -> None:
    """A step of tensors without values, which cannot be looked at: with a GPU, nothing would wait for it."""

    def make_decision(n: int, n_in: int, n_agents: int, storage: str) -> R.Decision:
        reward = CollaborationReward if n_in == 32 else R.RunningAverageCollaborationReward
        return getattr(R, kind)(n, n_in, n_agents, policy_storage_type=storage, additional_reward_class=reward)

    net = routed.make(model, 1, routed.layer_sizes(28, 2, 8, 3), 5, 4, 2, make_decision).to("meta")
    tasks = torch.zeros(6, dtype=torch.int64, device="meta")
    estimates, records = net(torch.zeros(6, 1, 28, 28, device="meta"), tasks)
    sum(Loss(nn.CrossEntropyLoss(), NegLossReward())(estimates, tasks, records)).backward()
    assert all(p.grad is not None for p in net.trunk.parameters())


def test_dispatching_and_masks() -> None:
    """Each agent decides for its own samples; inactive ones make no step; gradients reach the agents that decided."""
    xs, records = start()
    dispatcher, layer = R.AAC(3, 6), R.AAC(4, 6, num_agents=3, approx_hidden_dims=(5,)).eval()
    _, records, agents = dispatcher(xs, records, [])
    _, records, actions = layer(xs, records, agents, torch.arange(9) < 6)
    assert len(records) == 9 and records.active().sum(0).tolist() == [2] * 6 + [1] * 3
    alone = [layer.policy.nets[agent](xs[i : i + 1]).log_softmax(1)[0] for i, agent in enumerate(agents)]
    assert_agrees(records.steps[1].states[:6, :, 0], torch.stack(alone)[:6], 1e-5)
    assert not actions[6:].any() and not records.steps[1].states[6:].any()
    loss = Loss(nn.MSELoss(), NegLossReward())
    sum(loss(torch.randn(9, 2), torch.zeros(9, 2), records)).backward()
    used = set(agents[:6].tolist())
    for agent, net in enumerate(layer.policy.nets):
        assert any(p.grad is not None and p.grad.any() for p in net.parameters()) == (agent in used)


def test_samples_are_routed_one_by_one_or_together() -> None:
    """A batch in evaluation is what its samples are alone."""
    torch.manual_seed(0)
    layers = [
        R.REINFORCE(3, 6),
        Selection(*(nn.Linear(6, 6) for _ in range(3))),
        R.WPL(2, 6),
        Selection(nn.Linear(6, 4), MLP(6, 4)),
    ]

    def route(xs: Tensor) -> Tensor:
        triple = Initialization()(xs)
        for layer in layers:
            triple = layer.eval()(*triple)
        return triple[0]

    xs, _ = start()
    assert_agrees(route(xs), torch.cat([route(x[None]) for x in xs]), 1e-5)


def test_mlp_runs_hooks() -> None:
    seen = []
    mlp = MLP(6, 4, hidden=(8,))
    mlp.register_forward_hook(lambda *_: seen.append(1))
    mlp(torch.zeros(1, 6))
    assert seen


def test_given_networks() -> None:
    """Copies for each agent, of a policy and of a value net; published names of the arguments, too."""
    net = nn.Sequential(nn.Linear(6, 4))
    layer = R.WPL(4, num_agents=2, policy_net=net)
    assert torch.equal(layer.policy.nets[1][0].weight, net[0].weight) and layer.value.nets[0][0].weight is not net[0].weight
    assert len(R.REINFORCE(4, approx_module=net).policy.nets) == 1
    other = nn.Sequential(nn.Linear(6, 4))
    assert torch.equal(R.WPL(4, 6, value_net=other).value.nets[0][0].weight, other[0].weight)


class ConvolutionalNet(nn.Module):
    """(N, 2, 5, 5) -> (N, n_out): an input of another shape is an error."""

    def __init__(self, n_out: int):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 3, 3), nn.Linear(27, n_out)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (2, 5, 5)
        return self.linear(self.conv(x).flatten(1))


@pytest.mark.parametrize("kind", KINDS)
def test_networks_for_images(kind: str) -> None:
    """Given networks get the samples as they are; the MLPs that a layer makes itself get them flattened."""
    layer = getattr(R, kind)
    given: dict = {"approx_module": ConvolutionalNet(4), "in_features": 50}
    layers = [layer(4, num_agents=2, **given), layer(4, in_features=50, num_agents=2)]
    if layer.values == "state" and kind != "RELAX":
        layers.append(layer(4, num_agents=2, approx_module=ConvolutionalNet(4), value_net=ConvolutionalNet(1)))
    for layer in layers:
        xs, records, _ = Initialization()(torch.randn(6, 2, 5, 5))
        ys, records, actions = layer(xs, records, torch.arange(6) % 2)
        assert ys.shape == xs.shape
        _, loss = Loss(nn.MSELoss(), NegLossReward())(ys, xs * 0, records)
        (loss + ys.sum()).backward()
        assert all(p.grad is not None for p in layer.policy.parameters())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64, torch.float32])
def test_masks_of_any_type(kind: torch.dtype) -> None:
    xs, _ = start()
    mask, actions = torch.arange(9) % 3 > 0, torch.arange(9) % 2
    layer, selection = R.REINFORCE(2, 6).eval(), Selection(nn.Linear(6, 5), nn.Linear(6, 5))
    outputs = []
    for m in (mask, mask.to(kind)):
        _, records = start()
        outputs.append((layer(xs, records, mask=m)[2], records.active(), selection(xs, records, actions, m)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_lstm_cell() -> None:
    """hidden=None; the caller's mask stays; policies keep their initial weights; action 0 is an ordinary module."""
    torch.manual_seed(0)
    cell = RoutedLSTMCell(6, 4, 3, 2, R.REINFORCE, route_i2h=True, policy_storage_type="tabular", num_agents=2)
    routers = [layer for layer in cell.modules() if isinstance(layer, R.Decision)]
    assert len(routers) == 4 and all((layer.policy.table == 1 / 3).all() for layer in routers)
    xs, records = start(40)
    mask = torch.arange(40) < 30
    before = mask.clone()
    (h, c), records = cell(xs, None, records, torch.arange(40) % 2, mask)
    assert torch.equal(mask, before) and not h[30:].any() and h[:30].all() and c.shape == (40, 4)
    assert torch.equal(records.active(), mask.expand(4, 40)) and (records.actions()[:, :30] == 0).any()
    (h + c).sum().backward()


def test_set_exploration() -> None:
    net = nn.Sequential(R.QLearning(3, 6), R.GumbelSoftmax(3, 6))
    R.set_exploration(net, 0.3)
    assert net[0].exploration == 0.3 and net[1].temperature == pytest.approx(0.1 + 9.9 * 0.3)


# ---- bad input and published text ----------------------------------------------------------------------------------------


def call(layer: nn.Module, **arguments: object) -> None:
    xs, records = start()
    layer(xs, records, **arguments)


MASK = torch.zeros(9, dtype=torch.bool)
BAD = {
    "num_selections is 0": lambda: R.REINFORCE(0, 6),
    "num_agents is 0": lambda: R.REINFORCE(4, 6, 0),
    "exploration is 1.5": lambda: R.QLearning(4, 6, exploration=1.5),
    "exploration is -0.1": lambda: R.QLearning(4, 6).set_exploration(-0.1),
    "policy_storage_type is 'table'": lambda: R.REINFORCE(4, 6, policy_storage_type="table"),
    "in_features is None": lambda: R.REINFORCE(4),
    "scale is 'both'": lambda: R.GumbelSoftmax(4, 6, scale="both"),
    "rewards has 2 entries, num_selections is 4": lambda: R.REINFORCE(4, 6, additional_reward_func=ManualReward([1, 2])),
    "prior_actions is None: with 3 agents": lambda: call(R.REINFORCE(4, 6, 3)),
    "prior_actions holds 3: there are 3 agents": lambda: call(R.REINFORCE(4, 6, 3), prior_actions=torch.full((9,), 3)),
    "prior_actions has the shape (2,)": lambda: call(R.REINFORCE(4, 6, 3), prior_actions=[0, 1]),
    "mask leaves no sample active": lambda: call(R.REINFORCE(4, 6), mask=MASK),
    "mask has the shape (8,)": lambda: call(R.REINFORCE(4, 6), mask=MASK[1:]),
    "actions holds 2: there are 2 modules": lambda: call(Selection(nn.ReLU(), nn.Tanh()), actions=torch.full((9,), 2)),
    "actions holds -1: there are 2 modules": lambda: call(Selection(nn.ReLU(), nn.Tanh()), actions=torch.full((9,), -1)),
    "actions has the shape (2,): the batch has 9": lambda: call(Selection(nn.ReLU(), nn.Tanh()), actions=torch.tensor([0, 1])),
    "records are of 9 samples: the batch has 4": lambda: R.REINFORCE(4, 6)(torch.zeros(4, 6), start()[1]),
    "records are of 9 samples: the batch has 4 losses": lambda: Loss(nn.MSELoss(), NegLossReward())(
        torch.zeros(4, 2), torch.zeros(4, 2), start()[1]
    ),
    "policy_net is given, but policy_storage_type is tabular": lambda: R.REINFORCE(
        4, 6, policy_storage_type="tabular", approx_module=nn.Linear(6, 4)
    ),
    "value_net is given, but policy_storage_type is tabular": lambda: R.AAC(
        4, 6, policy_storage_type="tabular", value_net=nn.Linear(6, 1)
    ),
    "value_net is given, but REINFORCE estimates no values": lambda: R.REINFORCE(4, 6, value_net=nn.Linear(6, 1)),
    "approx_module and policy_net are given": lambda: R.REINFORCE(4, approx_module=nn.Linear(6, 4), policy_net=nn.Linear(6, 4)),
    "additional_reward_class and additional_reward_func": lambda: R.REINFORCE(
        4, 6, additional_reward_class=CollaborationReward, additional_reward_func=CollaborationReward()
    ),
    "in_features is None: the control of RELAX": lambda: R.RELAX(4, approx_module=nn.Linear(6, 4)),
    "in_features is None: an approx policy": lambda: R.AAC(4, approx_module=nn.Linear(6, 4)),
    "num_actions is 3: the layer has 5 selections": lambda: R.REINFORCE(
        5, 6, additional_reward_func=CollaborationReward(num_actions=3)
    ),
    "history_len is 0": lambda: CollaborationReward(history_len=0),
    "history_len is -1": lambda: R.RunningAverageCollaborationReward(history_len=-1),
    "actions is None": lambda: call(Selection(nn.ReLU()), actions=None),
    "modules is empty": lambda: Selection(),
    "xs is an empty batch": lambda: Initialization()(torch.zeros(0, 6)),
    "tasks has the shape (2,): the batch has 3": lambda: Initialization()(torch.zeros(3, 6), [0, 1]),
    "tasks are torch.float32": lambda: Initialization()(torch.zeros(3, 6), [0.7, 0.7, 0.7]),
    "tasks has the shape (3, 2)": lambda: Initialization()(torch.zeros(3, 6), torch.zeros(3, 2).long()),
    "tasks holds -1": lambda: Initialization()(torch.zeros(3, 6), [0, 1, -1]),
    "prior_actions are torch.float32": lambda: R.WPL(3, 6, num_agents=2)(*start()[:2], torch.full((9,), 0.7)),
    "mask has values other than 0 and 1": lambda: R.WPL(3, 6)(*start(), mask=torch.tensor([2] * 9)),
    "tasks is ()": lambda: call(R.PerTaskAssignment()),
    "the final rewards hold nan": lambda: Loss(nn.MSELoss(), NegLossReward())(
        torch.full((9, 2), torch.nan), torch.zeros(9, 2), start()[1]
    ),
    "ystrue is None": lambda: Loss(nn.MSELoss(), NegLossReward())(torch.zeros(9, 2), None, start()[1]),
    "records is a Tensor": lambda: Loss(nn.MSELoss(), NegLossReward())(torch.zeros(9, 2), start()[1], torch.zeros(9, 2)),
    "pytorch_loss_func is None": lambda: Loss(None, NegLossReward()),
    "depth_routing is 0": lambda: RoutedLSTMCell(6, 4, 3, 0, R.REINFORCE),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message]()


def test_unknown_keywords_are_refused() -> None:
    for kind in (R.REINFORCE, R.RELAX, R.GumbelSoftmax):
        with pytest.raises(TypeError, match="colour"):
            kind(4, 6, colour="red")


def snippets(text: str) -> list[str]:
    """Paragraphs of a text that are code: they parse, and assign or call something."""
    codes = []
    for paragraph in text.split("\n\n"):
        code = paragraph.replace("[... all other parameters ...]", "other_parameters")
        try:
            compiled = compile(code, "published", "exec")
        except SyntaxError:
            continue
        if "=" in code and compiled.co_code:
            codes.append(code)
    return codes


def test_snippets() -> None:
    """All code of the published description runs as it is written there."""
    codes = snippets(Path(DATA / "routing" / "published.md").read_text())
    assert len(codes) == 10
    others = types.SimpleNamespace(PerTaskAssignment=R.PerTaskAssignment)
    published = types.SimpleNamespace(DecisionLayers=types.SimpleNamespace(Others=others))
    module = nn.Linear(6, 5)
    space = {
        **vars(R), "nn": nn, "torch": torch, "optim": optim, "PytorchRouting": published, "Decision": R.WPL,
        "batch": torch.randn(8, 6), "tasks": list(range(4)) * 2, "num_selections": 5, "in_features": 6, "in_dim": 6,
        "out_dim": 5,
        "modules": [copy.deepcopy(module) for _ in range(5)], "decision_dispatcher": R.REINFORCE(4, 6),
        "decision_selector": R.REINFORCE(5, 6, num_agents=4), "batch_estimates": module(torch.randn(8, 6)),
        "batch_true": torch.randint(0, 5, (8,)), "opt": optim.SGD(module.parameters(), 0.1), "decision_module": module,
        "other_parameters": list(module.parameters()), "decision_learning_rate": 0.1, "module_learning_rate": 0.1,
        "pytorch_loss_func": nn.CrossEntropyLoss(), "routing_reward_func": NegLossReward(),
    }  # fmt: skip
    for code in codes:
        if "PerTaskAssignment" in code:  # which needs tasks, as the text says
            space["meta_list"] = Initialization()(space["batch"], space["tasks"])[1]
        if "selection(batch" in code:  # of the actions that were decided last
            space["actions"] = space["selection_actions"]
        exec(code, space)
        if "selection" in space and "selection(batch" in code:
            assert space["batch_out"].shape == (8, 5)
    assert len(space["selection"].selectable) == 2 and space["module_loss"].ndim == 0


@pytest.mark.parametrize("name, n", [("layers", 5), ("policies", 1), ("grouped", 1), ("rewards", 3)])
def test_examples_in_docstrings(name: str, n: int) -> None:
    assert doctest.testmod(importlib.import_module(f"common.routing.{name}")) == (0, n)
