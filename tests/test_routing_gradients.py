"""Gradients of decisions against exact ones, by enumeration: what is called unbiased is, within 3 standard errors.

Every sample has an agent of its own, all with the same table, so that gradients come sample by sample.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common.routing as R
from common.routing import Initialization, Loss, NegLossReward, Selection
from common.routing.decision import Transition
from common.routing.reparameterized import relaxed_samples

K = 3
LOGITS = torch.tensor([[0.5, -0.3, 0.1], [-0.2, 0.4, 0.0]])  # of two decisions
COSTS = torch.tensor([[1.0, 2.5, 0.2], [3.0, 0.5, 1.0], [0.3, 1.8, 2.0]])  # of two actions
N = 60_000


def exact_gradient(exploration: float = 1.0) -> Tensor:
    """Of the expected cost with respect to the logits, (2, K); each with the draws of the other held fixed."""
    logits = LOGITS.clone().requires_grad_()
    p = logits.softmax(1)
    drawn = (exploration * p + (1 - exploration) * F.one_hot(p.argmax(1), K)).detach()
    (p[0] @ COSTS @ drawn[1] + drawn[0] @ COSTS @ p[1]).backward()
    return logits.grad


def sampled_gradients(kind: str, seed: int = 0, **options: object) -> Tensor:
    """Of every sample's routing loss with respect to the logits of both decisions: (N, 2, K)."""
    torch.manual_seed(seed)
    layers = [getattr(R, kind)(K, num_agents=N, policy_storage_type="tabular", **options) for _ in range(2)]
    for layer, logits in zip(layers, LOGITS, strict=True):
        layer.policy.load_state_dict({"table": logits.repeat(N, 1)})
        if layer.value is not None:
            layer.value.load_state_dict({"table": torch.full_like(layer.value.table, -1.2)})
    xs, records, _ = Initialization()(torch.zeros(N, 1))
    for layer in layers:
        layer(xs, records, torch.arange(N))
    costs = COSTS[records.actions()[0], records.actions()[1]]
    _, routing_loss = Loss(nn.MSELoss(), NegLossReward())(xs, None, records, external_losses=costs, reduce=False)
    routing_loss.sum().backward()
    return torch.stack([layer.policy.table.grad for layer in layers], 1)


def assert_unbiased(gradients: Tensor, exact: Tensor) -> None:
    error = gradients.mean(0) - exact
    standard = gradients.std(0) / len(gradients) ** 0.5
    assert (error.abs() <= 3 * standard).all(), (error / standard).tolist()
    assert standard.max() < 0.05 * exact.abs().max(), "too few samples to tell"


@pytest.mark.parametrize("kind", ["REINFORCE", "REINFORCEBl1", "ActorCritic", "EGreedyREINFORCE", "AAC", "EGreedyAAC"])
def test_policy_gradients_are_unbiased(kind: str) -> None:
    """Where actions are drawn from another distribution, the excursion objective of Degris et al. is meant."""
    if kind.startswith("EGreedy"):
        assert_unbiased(sampled_gradients(kind, exploration=0.5), exact_gradient(0.5))
    else:
        assert_unbiased(sampled_gradients(kind), exact_gradient())


def test_baselines_lower_the_variance() -> None:
    assert sampled_gradients("REINFORCEBl1").var(0).sum() < 0.6 * sampled_gradients("REINFORCE").var(0).sum()


# ---- RELAX ---------------------------------------------------------------------------------------------------------------

COST = torch.tensor([1.0, 2.5, 0.2])


def decide(layers: list[R.RELAX], n: int) -> R.Trajectories:
    """A batch of n through layers of one agent."""
    xs, records, _ = Initialization()(torch.zeros(n, 1))
    for layer in layers:
        layer(xs, records)
    return records


def estimates(records: R.Trajectories, costs: Tensor) -> Tensor:
    """The gradient of every sample's cost with respect to the logits, (N, decisions, K)."""
    gradients = []
    for step in records.steps:
        t = Transition(step.states, step.actions, -costs, -costs, torch.zeros_like(costs), step.control)
        gradients.append(step.decision.estimate(t).detach())
    return torch.stack(gradients, 1)


@pytest.mark.parametrize("trained", [False, True])
def test_relax(trained: bool) -> None:
    """Unbiased whatever the control variate; with one that was trained, of lower variance than REINFORCE."""
    torch.manual_seed(0)
    layer = R.RELAX(K, policy_storage_type="tabular", entropy_coef=0.0, approx_hidden_dims=(8,))
    layer.policy.load_state_dict({"table": LOGITS[:1]})
    loss_func = Loss(nn.MSELoss(), NegLossReward())
    optimizer = torch.optim.Adam(layer.value.parameters(), 0.02)
    for _ in range(300 if trained else 0):
        records = decide([layer], 100)
        costs = COST[records.actions()[0]]
        _, loss = loss_func(torch.zeros(100, 1), None, records, external_losses=costs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer.zero_grad()
    records = decide([layer], N)
    actions = records.actions()[0]
    costs = COST[actions]
    g = estimates(records, costs)[:, 0]
    p = LOGITS[0].softmax(0)
    exact = p * (COST - (p * COST).sum())
    assert_unbiased(g, exact)
    _, loss = loss_func(torch.zeros(N, 1), None, records, external_losses=costs)
    loss.backward()
    torch.testing.assert_close(layer.policy.table.grad[0], g.mean(0), rtol=1e-3, atol=1e-5)
    if trained:
        reinforce = costs[:, None] * (F.one_hot(actions, K) - p)
        assert g.var(0).sum() < 0.5 * reinforce.var(0).sum()


def test_relax_of_two_decisions() -> None:
    torch.manual_seed(0)
    layers = [R.RELAX(K, policy_storage_type="tabular", approx_hidden_dims=(8,)) for _ in range(2)]
    for layer, logits in zip(layers, LOGITS, strict=True):
        layer.policy.load_state_dict({"table": logits[None]})
    records = decide(layers, N)
    first, second = records.actions()
    assert_unbiased(estimates(records, COSTS[first, second]), exact_gradient())


def test_relax_leaves_policy_and_control_apart() -> None:
    """The loss of the control does not reach the policy; gradients go to the agent that decided, and scale with the loss."""
    torch.manual_seed(0)
    layer = R.RELAX(K, 4, num_agents=2, entropy_coef=0.0)
    grads = {}
    for coef in (0.0, 1.0):
        layer.value_coef = coef
        torch.manual_seed(1)
        xs, records, _ = Initialization()(torch.randn(9, 4))
        layer(xs, records, torch.ones(9, dtype=torch.int64))
        _, loss = Loss(nn.MSELoss(), NegLossReward())(xs, None, records, external_losses=torch.rand(9))
        layer.zero_grad()
        (0.5 * loss).backward()
        grads[coef] = [None if p.grad is None else p.grad.clone() for p in layer.policy.parameters()]
        moved = [p.grad is not None and bool(p.grad.any()) for p in layer.value.parameters()]
        assert moved == ([False] * 2 + [True] * 2 if coef else [False] * 4)
    assert grads[0.0][0] is None and torch.equal(grads[0.0][2], grads[1.0][2]) and grads[1.0][2].any()


def test_conditional_samples_have_the_distribution_of_all() -> None:
    torch.manual_seed(0)
    logits = LOGITS[:1].expand(N, K)
    action, soft, conditional = relaxed_samples(logits, torch.rand(N, K), torch.rand(N, K), 0.5)
    assert torch.equal(conditional.argmax(1), action)
    for power in (1, 2):
        a, b = soft**power, conditional**power
        error = ((a - b).mean(0) / ((a - b).std(0) / N**0.5)).abs()
        assert (error < 3).all(), error
    independent = torch.corrcoef(torch.stack([soft[action == 0, 1], conditional[action == 0, 1]]))[0, 1]
    assert independent.abs() < 0.03


# ---- Gumbel-softmax ------------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    """A module whose output is its cost."""

    def __init__(self, cost: float):
        super().__init__()
        self.cost = cost

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.cost)


def test_gumbel_softmax_tends_to_half_of_the_exact_gradient() -> None:
    """On the output, of a linear loss, at the lowest temperature."""
    torch.manual_seed(0)
    layer = R.GumbelSoftmax(K, num_agents=N, policy_storage_type="tabular", exploration=0.0, scale="output")
    layer.policy.load_state_dict({"table": LOGITS[:1].repeat(N, 1)})
    xs, records, _ = Initialization()(torch.zeros(N, 1))
    xs, records, actions = layer(xs, records, torch.arange(N))
    ys, records, _ = Selection(*(Constant(cost) for cost in COST.tolist()))(xs, records, actions)
    assert torch.allclose(ys[:, 0], COST[actions])
    ys.sum().backward()
    p = LOGITS[0].softmax(0)
    exact = p * (COST - (p * COST).sum())
    doubled = 2 * layer.policy.table.grad.mean(0)
    assert ((doubled - exact).abs() < 0.05 * exact.abs().max()).all(), (doubled, exact)
