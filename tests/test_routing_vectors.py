"""Routing against the numbers of the original: what that has right agrees, the rest is left out, or put right first."""

import json

import pytest
import torch
from torch import Tensor, nn

import common.routing as R
from common.routing import Initialization, Loss, RoutedLSTMCell, Selection
from common.routing.decision import Decision, Step, Transition, at_action
from common.routing.policies import Tables
from common.routing.reparameterized import relaxed_samples
from tests.reference import Vectors, assert_agrees

# channels that a kind of decision has
CHANNELS = {
    **dict.fromkeys(("REINFORCE", "QLearning", "SARSA", "GumbelSoftmax"), 1),
    **dict.fromkeys(("REINFORCEBl1", "REINFORCEBl2", "ActorCritic", "WPL", "AAC", "BootstrapAAC"), 2),
    **dict.fromkeys(("AdvantageLearning", "BootstrapAdvantageLearning"), 2),
    "EGreedyREINFORCE": 3,
    "EGreedyAAC": 4,
}
HIDDEN = {"linear": (), "mlp1": (9,), "mlp2": (8, 5), "tabular": ()}


def close(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert_agrees(actual, expected, 1e-4, what)


def load_agents(part: nn.Module, v: Vectors, prefix: str) -> None:
    """Parameters `prefix`<agent>/table, or `prefix`<agent>/layer<k>/weight and bias."""
    own = v.under(prefix)
    if isinstance(part, Tables):
        tables = [own[f"{agent}/table"] for agent in range(len(part.table))]
        part.load_state_dict({"table": torch.cat(tables)})
        return
    renamed = {}
    for name, value in own.items():
        agent, layer, kind = name.split("/")
        renamed[f"nets.{agent}.layers.{layer.removeprefix('layer')}.{kind}"] = value
    part.load_state_dict(renamed)


def gradients(part: nn.Module, v: Vectors, prefix: str) -> list[tuple[str, Tensor, Tensor]]:
    """(name, gradient here, gradient there) of everything under a prefix."""
    pairs = []
    for name, expected in v.under(prefix).items():
        agent, *rest = name.split("/")
        if rest == ["table"]:
            actual = part.table.grad[int(agent)][None]
        else:
            actual = getattr(part.nets[int(agent)].layers[int(rest[0].removeprefix("layer"))], rest[1]).grad
        pairs.append((name, torch.zeros_like(expected) if actual is None else actual, expected))
    assert pairs
    return pairs


# ---- policies ------------------------------------------------------------------------------------------------------------

POLICIES = Vectors("routing/policies")
CASES = sorted({tuple(key.split("/")[:2]) for key in POLICIES.arrays if "/" in key and key.split("/")[0] in CHANNELS})


def policy_layer(kind: str, storage: str) -> Decision:
    how = "tabular" if storage == "tabular" else "approx"
    detach = storage != "mlp1"
    layer = getattr(R, kind)(4, 6, 3, policy_storage_type=how, detach=detach, approx_hidden_dims=HIDDEN[storage]).eval()
    load_agents(layer.policy, POLICIES, f"{kind}/{storage}/param/policy/")
    if layer.value is not None:
        load_agents(layer.value, POLICIES, f"{kind}/{storage}/param/value/")
    return layer


@pytest.mark.parametrize("kind, storage", CASES)
def test_policies(kind: str, storage: str) -> None:
    """Actions, states and their gradients; with a mask, too. Of WPL, whose policy is mended, the values alone."""
    v, at = POLICIES, f"{kind}/{storage}/"
    layer = policy_layer(kind, storage)
    first = 1 if kind == "WPL" else 0
    xs = v["xs"].clone().requires_grad_()
    batch, records, _ = Initialization()(xs)
    ys, records, actions = layer(batch, records, v["prior_actions"])
    state = records.steps[0].states
    assert ys is xs and state.shape == (9, 4, CHANNELS[kind])
    assert torch.equal(actions, v[f"{at}actions_full"])
    close(state[:, :, first:], v[f"{at}state_full"][:, :, first : CHANNELS[kind]])
    assert torch.equal(records.active().sum(0), v[f"{at}steps_full"])
    if first == 0:
        (state * v[f"{at}weight_state"]).sum().backward()
        for name, actual, expected in gradients(layer.policy, v, f"{at}grad/policy/"):
            close(actual, expected, name)
        if layer.value is not None:
            for name, actual, expected in gradients(layer.value, v, f"{at}grad/value/"):
                close(actual, expected, name)
        close(torch.zeros_like(xs) if xs.grad is None else xs.grad, v[f"{at}grad_xs"])
    batch, records, _ = Initialization()(v["xs"])
    _, records, actions = layer(batch, records, v["prior_actions"], v["mask"])
    assert torch.equal(actions, v[f"{at}actions_masked"])
    close(records.steps[0].states[:, :, first:], v[f"{at}state_masked"][:, :, first : CHANNELS[kind]])
    assert torch.equal(records.active().sum(0), v[f"{at}steps_masked"])


# ---- losses --------------------------------------------------------------------------------------------------------------

# losses that are wrong in the original are mended here: test_targets, test_baselines, test_wpl
RIGHT = ("REINFORCE", "EGreedyREINFORCE", "QLearning", "AAC", "BootstrapAAC", "EGreedyAAC", "AdvantageLearning")


@pytest.mark.parametrize("kind", [*RIGHT, "BootstrapAdvantageLearning", "GumbelSoftmax"])
def test_losses(kind: str) -> None:
    """Losses of single samples and their gradients.

    The original's target of QLearning is max Q' - r or, at the end, the final reward: so rewards are turned round here.
    """
    v = Vectors("routing/losses")
    layer = getattr(R, kind)(4, 6)
    state = v[f"{kind}/state"][:, :, : CHANNELS[kind]].clone().requires_grad_()
    next_state = v[f"{kind}/next_state"][:, :, : CHANNELS[kind]]
    ends, reward = v["is_terminal"].bool(), v["reward"]
    if kind == "QLearning":
        reward = torch.where(ends, v["final_reward"], -reward)
    if kind == "BootstrapAdvantageLearning":
        reward = torch.where(ends, v["final_reward"], reward)
    known = layer.bootstrap(next_state, v["next_action"])
    next_value = torch.zeros(7) if known is None else known * ~ends
    loss = layer.loss(Transition(state, v["action"], reward, v["cum_return"], next_value))
    close(loss, v[f"{kind}/loss_single"])
    if kind != "GumbelSoftmax":
        loss.sum().backward()
        close(state.grad, v[f"{kind}/grad_state_single"][:, :, : CHANNELS[kind]])


def test_actor_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's loss has the return in the policy's term, too; its baseline Q(a) and its target max Q' - r are mended."""
    v, layer = Vectors("routing/losses"), R.ActorCritic(4, 6)
    state = v["ActorCritic/state"][:, :, :2].clone().requires_grad_()
    ends, actions = v["is_terminal"].bool(), v["action"]
    monkeypatch.setattr(layer, "state_value", lambda state: at_action(state[:, :, 1], actions).detach())
    next_value = v["ActorCritic/next_state"][:, :, 1].max(1).values * ~ends
    reward = torch.where(ends, v["final_reward"], -v["reward"])
    loss = layer.loss(Transition(state, actions, reward, v["cum_return"], next_value))
    close(loss, v["ActorCritic/loss_single"])
    loss.sum().backward()
    close(state.grad, v["ActorCritic/grad_state_single"][:, :, :2])


# ---- trajectories --------------------------------------------------------------------------------------------------------

TRAJECTORIES = Vectors("routing/trajectories")
EXACT = ("REINFORCE", "AAC", "AdvantageLearning")  # losses that are right in the original


def reward_of(config: dict, manual: Tensor) -> R.PerActionBaseReward:
    args = dict(config["per_action_reward_args"])
    if config["per_action_reward"] == "CollaborationReward":
        args["reward_ratio"] **= 2  # the original applies it twice
    if config["per_action_reward"] == "ManualReward":
        args = {"rewards": manual}
    return getattr(R, config["per_action_reward"])(**args)


@pytest.mark.parametrize("case", [str(name) for name in TRAJECTORIES.arrays["cases"]])
def test_trajectories(case: str) -> None:
    """Module losses, rewards, returns; where the decision's loss is right in the original, routing losses and gradients."""
    v, config = TRAJECTORIES, json.loads(str(TRAJECTORIES.arrays[f"{case}/config"]))
    layers = [
        getattr(R, config["decision"])(k, 6, additional_reward_func=reward_of(config, v["manual_rewards"]))
        for k in config["num_selections"]
    ]
    loss_name = config["loss"] or "MSELoss"
    loss_func = Loss(
        getattr(nn, loss_name)(),
        getattr(R, config["final_reward"])(),
        clear=config["clear"],
        normalize_per_action_rewards=config["normalize_per_action_rewards"],
    )
    for batch in range(config["batches"]):
        at = f"{case}/batch{batch}/" if config["batches"] > 1 else f"{case}/"
        _, records, _ = Initialization()(torch.zeros(9, 6))
        channels = CHANNELS[config["decision"]]
        states = [v[f"{at}state{t}"][:, :, :channels].clone().requires_grad_() for t in range(3)]
        alive, actions = v[f"{at}alive"].bool(), v[f"{at}actions"]
        for t, layer in enumerate(layers):
            records.steps.append(Step(layer, actions[t] * alive[t], alive[t], states[t], torch.zeros(9, dtype=torch.bool)))
            layer.reward_func.register(states[t][alive[t], :, 0], actions[t][alive[t]])
        if config["add_rewards"]:
            records.add_rewards = v[f"{at}add_rewards"]
        estimates = v[f"{at}y_est"].clone().requires_grad_()
        targets = v[f"{at}y_true"]
        if loss_name == "MSELoss":
            targets = torch.nn.functional.one_hot(targets, 5).float()
        external = v[f"{at}external_losses"] if config["external_losses"] else None
        rewards, returns, _ = loss_func.rewards(records, v[f"{at}final_reward"])
        close(rewards, v[f"{at}rewards"])
        close(returns, v[f"{at}returns"])
        module_loss, routing_loss = loss_func(estimates, targets, records, external, reduce=False)
        close(module_loss, v[f"{at}module_loss"])
        if config["decision"] in EXACT:
            # the original's value loss of AAC is a mean over the batch: the same in the mean
            if config["decision"] != "AAC":
                close(routing_loss, v[f"{at}routing_loss"])
            close(routing_loss.mean(), v[f"{at}routing_loss_mean"])
            (module_loss.mean() + routing_loss.mean()).backward()
            for t in range(3):
                close(states[t].grad, v[f"{at}grad_state{t}"][:, :, :channels], f"state {t}")
            if external is None:
                close(estimates.grad, v[f"{at}grad_y_est"])


# ---- selection -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_selection_of_the_original(masked: bool) -> None:
    v = Vectors("routing/selection")
    selection = Selection(*(nn.Linear(6, 5) for _ in range(4)))
    at = "linear/masked/" if masked else "linear/full/"
    for i, module in enumerate(selection.selectable):
        module.load_state_dict(v.under(f"linear/{i}/"))
    xs = v["xs"].clone().requires_grad_()
    batch, records, _ = Initialization()(xs)
    selection.start_logging_selections()
    ys, _, _ = selection(batch, records, v["actions"], v["mask"] if masked else None)
    if not masked:  # the original's log also has modules that were chosen for inactive samples alone
        assert selection.stop_logging_and_get_selections() == v[f"{at}selection_log"].tolist()
    close(ys, v[f"{at}out"])
    (ys * v["weight_out"]).sum().backward()
    close(xs.grad, v[f"{at}grad_xs"])
    for i, module in enumerate(selection.selectable):
        assert (module.weight.grad is None) == bool(v[f"{at}grad_is_none/{i}"])
        if module.weight.grad is not None:
            close(module.weight.grad, v[f"{at}grad/{i}/weight"])
            close(module.bias.grad, v[f"{at}grad/{i}/bias"])


def test_selection_of_convolutions() -> None:
    v = Vectors("routing/selection")
    selection = Selection(*(nn.Conv2d(2, 3, 3, padding=1) for _ in range(4)))
    for i, module in enumerate(selection.selectable):
        module.load_state_dict(v.under(f"conv/{i}/"))
    batch, records, _ = Initialization()(v["conv/xs"])
    close(selection(batch, records, v["actions"], v["mask"])[0], v["conv/out_masked"])


# ---- samples and exploration ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["linear", "tabular"])
@pytest.mark.parametrize("exploration", ["0.0", "0.1", "0.5"])
def test_gumbel_softmax(storage: str, exploration: str, monkeypatch: pytest.MonkeyPatch) -> None:
    v, at = Vectors("routing/gumbel_relax"), f"gumbel/{storage}/exploration{exploration}/"
    layer = R.GumbelSoftmax(
        4, 6, exploration=float(exploration), policy_storage_type="tabular" if storage == "tabular" else "approx"
    )
    load_agents(layer.policy, v, f"{at}param/policy/")
    monkeypatch.setattr(layer, "uniform", lambda logits: v["gumbel/uniform"])
    assert layer.temperature == pytest.approx(float(v[f"{at}temperature"]))
    xs = v["gumbel/xs"].clone().requires_grad_()
    batch, records, _ = Initialization()(xs)
    ys, records, actions = layer(batch, records)
    assert torch.equal(actions, v[f"{at}actions"])
    close(ys, v[f"{at}out"])
    close(records.steps[0].states, v[f"{at}state"])
    (ys * v["gumbel/weight_out"]).sum().backward()
    close(xs.grad, v[f"{at}grad_xs"])
    for name, actual, expected in gradients(layer.policy, v, f"{at}grad/policy/"):
        close(actual, expected, name)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_relaxed_samples(temperature: float) -> None:
    """Hard and relaxed ones; the original's conditional one is wrong, see test_routing_gradients.py."""
    v = Vectors("routing/gumbel_relax")
    hard, soft, conditional = relaxed_samples(
        v["relax/sample/logits"], v["relax/sample/uniform1"], v["relax/sample/uniform2"], temperature
    )
    assert torch.equal(hard, v[f"relax/sample/temperature{temperature}/hard"].long())
    close(soft, v[f"relax/sample/temperature{temperature}/soft"])
    assert torch.equal(conditional.argmax(1), hard)


def test_temperatures_and_rates() -> None:
    v = Vectors("routing/exploration")
    for i, e in enumerate(v["exploration"].double().tolist()):
        e = round(e, 6)
        for kind, attribute, when in (
            ("GumbelSoftmax", "temperature", "temperature_at_construction"),
            ("EGreedyREINFORCE", "exploration", "exploration_at_construction"),
            ("RELAX", "temperature", "temperature_at_construction"),
            ("REINFORCE", "temperature", "temperature_at_construction"),
        ):
            layer = getattr(R, kind)(4, 6, exploration=e)
            assert getattr(layer, attribute) == pytest.approx(float(v[f"{kind}/{when}"][i])), (kind, when, e)
        for kind, key, options in (
            ("REINFORCE", "temperature_with_set_pg_temp", {"set_pg_temp": True}),
            ("REINFORCE", "temperature_without", {}),
            ("GumbelSoftmax", "temperature_after_set", {}),
            ("RELAX", "temperature_after_set", {}),
            ("EGreedyREINFORCE", "exploration_after_set", {}),
            ("EGreedyAAC", "exploration_after_set", {}),
            ("QLearning", "exploration_after_set", {}),
        ):
            layer = getattr(R, kind)(4, 6, **options)
            layer.set_exploration(e)
            assert getattr(layer, key.split("_")[0]) == pytest.approx(float(v[f"{kind}/{key}"][i])), (kind, key, e)


@pytest.mark.parametrize("kind", ["REINFORCE", "ActorCritic", "AAC", "REINFORCEBl1"])
def test_temperature_of_policies(kind: str) -> None:
    v = Vectors("routing/exploration")
    layer = getattr(R, kind)(4, policy_storage_type="tabular", set_pg_temp=True).eval()
    layer.set_exploration(0.4)
    layer.policy.load_state_dict({"table": v["EGreedy/table"]})
    state = layer.state(torch.zeros(1, 6), torch.tensor([0]))
    close(state[0, :, 0], v[f"{kind}/logits_at_exploration0.4_set_pg_temp"])


# ---- the cell ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [str(name) for name in Vectors("routing/lstm").arrays["cases"]])
def test_lstm(case: str) -> None:
    """Two steps of the cell, for samples that never take action 0, which ends routing in the original."""
    v = Vectors("routing/lstm")
    agents = v[f"{case}/task_actions"] if "agents" in case else None
    two_layers = any("layer1" in key for key in v.under(f"{case}/param/"))
    cell = RoutedLSTMCell(
        6,
        4,
        3,
        1 if "depth1" in case else 2,
        getattr(R, str(v.arrays[f"{case}/agent_class"][0])),
        route_i2h="h2h" not in case,
        route_h2h="i2h" not in case,
        num_agents=1 if agents is None else 2,
        approx_hidden_dims=(3,) if two_layers else (),
    ).eval()
    for way in ("i2h", "h2h"):
        projection = getattr(cell, way)
        if isinstance(projection, nn.Linear):
            projection.load_state_dict(v.under(f"{case}/param/linear_{way}/"))
            continue
        for depth, (router, selection) in enumerate(zip(projection.routers, projection.selections, strict=True)):
            load_agents(router.policy, v, f"{case}/param/router_{way}/{depth}/policy/")
            if router.value is not None:
                load_agents(router.value, v, f"{case}/param/router_{way}/{depth}/value/")
            for i, module in enumerate(selection.selectable):
                module.load_state_dict(v.under(f"{case}/param/selection_{way}/{depth}/{i}/"))
    if case.startswith("both"):  # of WPL: the original's policy has the same greedy actions
        assert isinstance(cell.h2h.routers[0], R.WPL)
    _, records, _ = Initialization()(v["x"])
    hidden = (v["h0"], v["c0"])
    for step in (1, 2):
        hidden, records = cell(v["x"], hidden, records, agents)
        n_steps = len(records.steps)
        taken = v[f"{case}/actions"][:, :n_steps]
        has_next_epoch = ((taken > 0).sum(1) == n_steps) if taken.shape[1] == n_steps else torch.zeros(9, dtype=torch.bool)
        if step == 1:
            assert torch.equal(records.steps[0].actions, v[f"{case}/actions"][:, 0])
            assert has_next_epoch.any() or case == "h2h_depth2"  # where all samples take it
        if has_next_epoch.any():
            assert torch.equal(records.actions().T[has_next_epoch], taken[has_next_epoch])
            close(hidden[0][has_next_epoch], v[f"{case}/h{step}"][has_next_epoch], f"h{step}")
            close(hidden[1][has_next_epoch], v[f"{case}/c{step}"][has_next_epoch], f"c{step}")
