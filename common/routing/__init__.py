"""Routing networks: learned selection of modules (Rosenbaum et al., ICLR 2018; arXiv 1904.12774).

    init, decision = Initialization(), WPL(num_selections=3, in_features=6)
    selection = Selection(*[nn.Linear(6, 5) for _ in range(3)])
    loss_func = Loss(nn.CrossEntropyLoss(), NegLossReward())

    xs, records, actions = init(xs, tasks)                  # xs (B, 6), tasks (B)
    xs, records, actions = decision(xs, records, actions)   # a step in the trajectories, actions (B)
    ys, records, actions = selection(xs, records, actions)  # (B, 5)
    module_loss, routing_loss = loss_func(ys, targets, records)
    (module_loss + routing_loss).backward()

Names and arguments are the original's (PytorchRouting 0.4.1). What was wrong there, and the test here that holds it right
(in tests/test_routing*.py):

    original                                                      here                               test
    ------------------------------------------------------------  --------------------------------   ------------------------
    WPL: log-probabilities taken for probabilities, sign inverted,  softmax, weights p and 1 - p       test_bandit, test_wpl
      factor jumps at 0; initial gradient of 1e6
    QLearning, ActorCritic, Bl1, Bl2: target max Q' - r           r + V'                             test_targets, test_bandit
    the same: the last per-action reward is left out              it is part of r                    test_targets
    SARSA: current state's value, no reward                       r + Q'(a')                         test_targets, test_bandit
    EGreedy*: (N, N) losses                                       (N)                                test_losses
    EGreedy*: wrong distribution of the draw                      e p + (1 - e) [greedy]             test_sampling_of_egreedy
    AAC, EGreedyAAC: value loss is the batch mean                 per sample                         test_losses
    BootstrapAAC: runs for 1 or 5 samples; target not constant    any number; constant               test_losses
    Bl1, Bl2: baseline is the value of selection 0                sum p Q, trained on the return     test_baselines
    Bl2: only the return is weighted, without a bound             the advantage is, by at most 10    test_baselines
    ActorCritic: baseline depends on the action                   sum p Q                            test_baselines
    is_exploratory is 1 for greedy actions, random in evaluation  what it says                       test_is_exploratory
    GumbelSoftmax, PerTaskAssignment, PassThrough: broken losses  0; no step is made                 test_fixed_decisions
    update_target is overwritten by the batch                     it is what goes on                 test_update_target
    RELAX: wrong conditional sample, Jacobian of softmax twice,   rewritten, unbiased                test_routing_gradients.py
      gradients to other agents, writes into .grad
    one default reward object for all layers of a process         one a layer                        test_rewards_of_layers
    states of single channels are copied into others              exact channels                     test_policies
    CollaborationReward: ratio squared                            ratio                              test_trajectories
    evaluation enters the collaboration history                   only training does                 test_rewards_of_layers
    discounting, scale: stored, never used                        they are                           test_discounting_and_scale
    another number of selections ends the bootstrap               value of the next state, any K     test_bootstrap_over_widths
    no decision at all: an error in the loss                      routing loss 0                     test_fixed_decisions
    losses with more than one further axis fail                   summed per sample                  test_loss_of_sequences
    Selection: runs module 0 once more, on one sample; only       runs what is selected; any type    test_selection
      float32; one module: ignores actions and mask
    unknown keywords are swallowed; text and code name different  ValueError; both names             test_bad_input, _snippets
      arguments
    MLP: hooks do not run                                         they do                            test_mlp_runs_hooks
    LSTM: action 0 ends routing where module 0 is ordinary        only with recurrent=True           test_lstm
    LSTM: recurrent=True, hidden=None fail; the caller's mask is  they work; it is not               test_recurrent_lstm
      changed; policies are initialised anew
"""

from common.routing.cells import RoutedLSTMCell
from common.routing.decision import Decision
from common.routing.exploration import annealed, set_exploration
from common.routing.fixed import PassThrough, PerTaskAssignment
from common.routing.grouped import StackedLinear
from common.routing.layers import Initialization, Selection, Sequential
from common.routing.loss import Loss
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
from common.routing.trajectories import Trajectories
from common.routing.value_based import SARSA, AdvantageLearning, BootstrapAdvantageLearning, QLearning

__all__ = [
    "AAC",
    "MLP",
    "REINFORCE",
    "RELAX",
    "SARSA",
    "WPL",
    "ActorCritic",
    "AdvantageLearning",
    "BootstrapAAC",
    "BootstrapAdvantageLearning",
    "CollaborationReward",
    "CorrectClassifiedReward",
    "Decision",
    "EGreedyAAC",
    "EGreedyREINFORCE",
    "GumbelSoftmax",
    "Initialization",
    "Loss",
    "ManualReward",
    "NegLossReward",
    "PassThrough",
    "PerActionBaseReward",
    "PerTaskAssignment",
    "QLearning",
    "REINFORCEBl1",
    "REINFORCEBl2",
    "RoutedLSTMCell",
    "RunningAverageCollaborationReward",
    "Selection",
    "Sequential",
    "StackedLinear",
    "Trajectories",
    "annealed",
    "set_exploration",
]
