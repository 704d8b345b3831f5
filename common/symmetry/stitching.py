"""The front of one trained network, a joint, and the back of another (Godfrey et al. 2022, section 4).

    for place in joints_of(model1):
        stitched = stitch(model1, model2, place.index, Birkhoff(place.shape[0]))

Both networks are of one architecture, so the stitched one needs no forward of its own: it is that architecture, with model 1's
weights up to the joint, model 2's behind it, and the joint as the next thing after the activation. All weights but the
joint's are frozen. Nothing in front of the joint depends on what is trained, so autograd keeps nothing of the front; behind
it, gradients pass through but none of a weight is computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.symmetry.joints import Joint


@dataclass(frozen=True)
class Place:
    """Where two networks can be joined: after a module, which has this index and name."""

    index: int  # among all modules, depth first, the root being 0: the published number of a layer
    name: str
    shape: tuple[int, ...]  # of what the module gives of one image: (C, H, W), or (T, C) of T tokens
    inside_block: bool  # before a residual block's addition, where the skip path goes past the joint

    @property
    def channels(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]


def joints_of(model: nn.Module, example: Tensor | None = None) -> list[Place]:
    """All places for a joint: the outputs of nn.ReLU modules, and of the modules that stand in a list called "blocks".

    `example` is an image (1, C, H, W) to find shapes with; if there is none, (1, 3, 32, 32).

    >>> joints_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10)))
    [Place(index=2, name='1', shape=(8, 30, 30), inside_block=False)]
    """
    _, shapes = _walk(model, example)
    places = []
    for index, (name, module) in enumerate(model.named_modules()):
        of_transformer = name.split(".")[-2:-1] == ["blocks"]
        if name in shapes and (isinstance(module, nn.ReLU) or of_transformer):
            places.append(Place(index, name, shapes[name], _is_inside_block(model, name)))
    return places


def _is_inside_block(model: nn.Module, name: str) -> bool:
    """Whether a ReLU is one of a block with several, and not the last, which follows the addition."""
    parent, _, own = name.rpartition(".")
    block = model.get_submodule(parent)
    activations = [child for child, module in block.named_children() if isinstance(module, nn.ReLU)]
    return parent != "" and not isinstance(block, nn.Sequential) and own in activations[:-1]


def _walk(model: nn.Module, example: Tensor | None = None) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """Send an image through: what begins and ends in order, as "+name" and "-name", and the shapes of outputs by name."""
    first = next(model.parameters())
    image = torch.zeros(1, 3, 32, 32) if example is None else example
    events: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, module in model.named_modules():

        def begins(module: nn.Module, inputs: object, name: str = name) -> None:
            events.append(f"+{name}")

        def ends(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
            events.append(f"-{name}")
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        hooks += [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(image.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return events, shapes


class StitchedModel(nn.Module):
    """A network with a joint behind one of its modules; made by `stitch`.

    In train mode, as published, all batch norms use and update batch statistics, in front, too, though only the joint learns.
    Keys of the state dict are the networks' own, and the joint's, once, at network.<name of the place>.1.
    """

    def __init__(self, network: nn.Module, place: Place, joint: Joint):
        super().__init__()
        self.place = place
        self.network = network.requires_grad_(False)
        activation = network.get_submodule(place.name)
        network.set_submodule(place.name, nn.Sequential(activation, joint))

    @property
    def joint(self) -> Joint:
        joint = self.network.get_submodule(f"{self.place.name}.1")
        assert isinstance(joint, Joint)
        return joint

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def stitch(model1: nn.Module, model2: nn.Module, layer: int, joint: Joint, example: Tensor | None = None) -> StitchedModel:
    """Model 1 up to and including the module with index `layer`, the joint, and the rest of model 2, buffers included.

    What is not yet begun when the joint's module ends is behind it. Inside a residual block, so, the skip path brings model 1's
    activation past the joint, as published, and if it has weights, they are model 2's. The models are copied, not changed; the
    joint is not copied. Raises ValueError if there is no place for a joint at the layer, or the models or the joint
    do not fit. For `example`, see joints_of.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    >>> from common.symmetry.joints import Full
    >>> stitched = stitch(net, copy.deepcopy(net), layer=2, joint=Full(4))
    >>> stitched(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    >>> [name for name, parameter in stitched.named_parameters() if parameter.requires_grad]
    ['network.1.1.weight']
    """
    places = {place.index: place for place in joints_of(model1, example)}
    if layer not in places:
        raise ValueError(f"layer {layer} is no place for a joint: choose from {' '.join(map(str, places))}")
    place = places[layer]
    if joint.channels != place.channels:
        raise ValueError(f"a joint of {joint.channels} channels does not fit the {place.channels} of layer {layer}")
    _check_same_architecture(model1, model2)
    network = copy.deepcopy(model1)
    behind = copy.deepcopy(model2)
    for name in modules_behind(model1, place, example):
        ours, theirs = network.get_submodule(name), behind.get_submodule(name)
        for own, tensor in [*theirs.named_parameters(recurse=False), *theirs.named_buffers(recurse=False)]:
            setattr(ours, own, tensor)
    return StitchedModel(network, place, joint)


def modules_behind(model: nn.Module, place: Place, example: Tensor | None = None) -> list[str]:
    """Names of the modules that begin after the one at the place has ended; a module that is not called goes with its parent.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    >>> modules_behind(net, joints_of(net)[0])
    ['2', '3']
    """
    events, _ = _walk(model, example)
    in_front = {event[1:] for event in events[: events.index(f"-{place.name}")]}
    called = {event[1:] for event in events}
    behind: list[str] = []
    for name, _ in model.named_modules():
        parent = name.rpartition(".")[0]
        if (name in called and name not in in_front) or (name not in called and parent in behind):
            behind.append(name)
    return behind


def _check_same_architecture(model1: nn.Module, model2: nn.Module) -> None:
    shapes1, shapes2 = ({key: tuple(value.shape) for key, value in m.state_dict().items()} for m in (model1, model2))
    different = [key for key in shapes1 | shapes2 if shapes1.get(key) != shapes2.get(key)]
    if different:
        first = ", ".join(f"{key} ({shapes1.get(key, 'missing')}, {shapes2.get(key, 'missing')})" for key in different[:3])
        more = f" and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(f"the models are not of one architecture: they differ in {first}{more}")


# ---- batch statistics ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def reestimate_statistics(model: StitchedModel, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Batch norm's running statistics under the rounded joint (--bn_epoch): the buffers before, for restore_statistics.

    One pass over batches of images, without gradients, the joint as in evaluation, all else in train mode. The soft matrix and
    what it is rounded to see different statistics. Running averages of momentum 0.1 forget all but the last 100 batches.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    >>> from common.symmetry.joints import Birkhoff
    >>> stitched = stitch(net, net, layer=2, joint=Birkhoff(4))
    >>> before = reestimate_statistics(stitched, [torch.randn(8, 3, 32, 32) for _ in range(2)])
    >>> stitched.network[2].num_batches_tracked
    tensor(2)
    >>> restore_statistics(stitched, before)
    >>> stitched.network[2].num_batches_tracked
    tensor(0)
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()
    model.joint.eval()
    for images in batches:
        model(images)
    model.train(was_training)
    return before


@torch.no_grad()
def restore_statistics(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Put buffers back to what they were."""
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
