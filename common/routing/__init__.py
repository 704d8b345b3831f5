"""Routing networks: learned selection of modules (Rosenbaum et al., ICLR 2018; arXiv 1904.12774).

    init, decision = Initialization(), WPL(num_selections=3, in_features=6)
    selection = Selection(*[nn.Linear(6, 5) for _ in range(3)])
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())

    xs, records, actions = init(xs, tasks)                  # xs (B, 6), tasks (B)
    xs, records, actions = decision(xs, records, actions)   # actions (B); the trajectories get one more step
    ys, records, actions = selection(xs, records, actions)  # (B, 5)
    module_loss, routing_loss = loss_func(ys, targets, records)
    (module_loss + routing_loss).backward()

Names and arguments are the published ones (PytorchRouting 0.4.1).
"""

from common.routing.decision import Decision, Trajectories, set_exploration
from common.routing.fixed import PassThrough, PerTaskAssignment
from common.routing.grouped import StackedLinear
from common.routing.layers import Initialization, Selection
from common.routing.loss import Loss
from common.routing.lstm import RoutedLSTMCell
from common.routing.policies import MLP
from common.routing.policy_gradient import (
    AAC,
    REINFORCE,
    WPL,
    ActorCritic,
    BootstrapAAC,
    EGreedyAAC,
    EGreedyREINFORCE,
    REINFORCEBl1,
    REINFORCEBl2,
)
from common.routing.reparameterized import RELAX, GumbelSoftmax
from common.routing.rewards import (
    CollaborationReward,
    CorrectClassifiedReward,
    ManualReward,
    NegLossReward,
    PerActionBaseReward,
    RunningAverageCollaborationReward,
)
from common.routing.value_based import SARSA, AdvantageLearning, BootstrapAdvantageLearning, QLearning

# fmt: off
__all__ = [
    "AAC", "MLP", "REINFORCE", "RELAX", "SARSA", "WPL", "ActorCritic", "AdvantageLearning", "BootstrapAAC",
    "BootstrapAdvantageLearning", "CollaborationReward", "CorrectClassifiedReward", "Decision", "EGreedyAAC",
    "EGreedyREINFORCE", "GumbelSoftmax", "Initialization", "Loss", "ManualReward", "NegLossReward", "PassThrough",
    "PerActionBaseReward", "PerTaskAssignment", "QLearning", "REINFORCEBl1", "REINFORCEBl2", "RoutedLSTMCell",
    "RunningAverageCollaborationReward", "Selection", "StackedLinear", "Trajectories", "set_exploration",
]
