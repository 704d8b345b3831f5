"""Stitching: the front of one trained network, a stitching layer, the back of another (Godfrey et al. 2022, section 4).

    for point in stitch_points(model1):
        stitched = stitch(model1, model2, point.index, Birkhoff(point.channels))

Both networks are of one architecture, so the stitched one needs no forward of its own: it is that architecture, with model 1's
weights up to the stitching layer, model 2's behind it, and the layer right after the activation. All other weights are frozen.
Nothing in front of the layer depends on what is trained, so autograd keeps nothing of the front; behind it, gradients pass
through, but none is computed for a weight.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.symmetry.stitching_layers import StitchingLayer


@dataclass(frozen=True)
class StitchPoint:
    """Where two networks can be stitched: after the module with this index and name."""

    index: int  # among all modules, depth first, the root being 0: the published number of a layer
    name: str
    shape: tuple[int, ...]  # of the module's output for one image: (C, H, W), or (T, C) of T tokens
    inside_block: bool  # before a residual block's addition: the skip path goes past the stitching layer

    @property
    def channels(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else self.shape[-1]


def stitch_points(model: nn.Module, example: Tensor | None = None) -> list[StitchPoint]:
    """All stitch points: outputs of nn.ReLU modules, and of the modules in a list called "blocks" (of a transformer).

    `example` is an image (1, C, H, W) to find shapes with; the default is (1, 3, 32, 32). A model on the meta device will do.

    >>> stitch_points(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10)))
    [StitchPoint(index=2, name='1', shape=(8, 30, 30), inside_block=False)]
    """
    shapes = _trace_calls(model, example).shapes
    points = []
    for index, (name, module) in enumerate(model.named_modules()):
        is_block = name.split(".")[-2:-1] == ["blocks"]
        if name in shapes and (isinstance(module, nn.ReLU) or is_block):
            points.append(StitchPoint(index, name, shapes[name], _is_inside_block(model, name)))
    return points


def _is_inside_block(model: nn.Module, name: str) -> bool:
    """True if a ReLU is one of several in a block, and not the last, which follows the addition."""
    parent, _, own = name.rpartition(".")
    block = model.get_submodule(parent)
    activations = [child for child, module in block.named_children() if isinstance(module, nn.ReLU)]
    return parent != "" and not isinstance(block, nn.Sequential) and own in activations[:-1]


@dataclass
class _Calls:
    """One forward pass, by module name: the time at which the first call begins and ends, and the output's shape."""

    began: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _trace_calls(model: nn.Module, example: Tensor | None = None) -> _Calls:
    """Send an image through the model, in evaluation mode."""
    first = next(model.parameters())
    image = torch.zeros(1, 3, 32, 32) if example is None else example
    calls, clock = _Calls(), itertools.count()
    hooks = []
    for name, module in model.named_modules():

        def begin(module: nn.Module, inputs: object, name: str = name) -> None:
            calls.began.setdefault(name, next(clock))

        def end(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
            calls.ended.setdefault(name, next(clock))
            if isinstance(output, Tensor):
                calls.shapes[name] = tuple(output.shape[1:])

        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        with torch.no_grad(), _keep_modes(model):
            model.eval()(image.to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    """Put every module back into its mode, training or evaluation, at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class StitchedModel(nn.Module):
    """A network with a stitching layer behind one of its modules; made by `stitch`.

    In train mode, as published, all batch norms use and update batch statistics, also those in front, though only the stitching
    layer learns. Keys of the state dict are the network's, and the layer's, once, at network.<name of the point>.1.
    """

    def __init__(self, network: nn.Module, point: StitchPoint, stitching_layer: StitchingLayer):
        super().__init__()
        self.point = point
        self.network = network.requires_grad_(False)
        activation = network.get_submodule(point.name)
        network.set_submodule(point.name, nn.Sequential(activation, stitching_layer))

    @property
    def stitching_layer(self) -> StitchingLayer:
        layer = self.network.get_submodule(f"{self.point.name}.1")
        assert isinstance(layer, StitchingLayer)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def stitch(
    model1: nn.Module, model2: nn.Module, index: int, stitching_layer: StitchingLayer, example: Tensor | None = None
) -> StitchedModel:
    """Model 1 up to and including the module with this index, the stitching layer, and the rest of model 2, buffers included.

    The rest is every module whose first call begins after that module has ended. So inside a residual block the skip path
    takes model 1's activation past the stitching layer, as published, and if the path has weights, they are model 2's. The
    models are copied, not changed; the stitching layer is not copied. For `example`, see stitch_points. Raises ValueError if
    there is no stitch point of this index, or the models or the layer do not fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    >>> from common.symmetry.stitching_layers import Full
    >>> stitched = stitch(net, copy.deepcopy(net), 2, Full(4))
    >>> stitched(torch.zeros(5, 3, 32, 32)).shape
    torch.Size([5, 10])
    >>> [name for name, parameter in stitched.named_parameters() if parameter.requires_grad]
    ['network.1.1.weight']
    """
    points = {point.index: point for point in stitch_points(model1, example)}
    if index not in points:
        raise ValueError(f"layer {index} is no stitch point: choose from {' '.join(map(str, points))}")
    point = points[index]
    if stitching_layer.channels != point.channels:
        raise ValueError(
            f"a stitching layer of {stitching_layer.channels} channels does not fit the {point.channels} of layer {index}"
        )
    _check_same_architecture(model1, model2)
    network = copy.deepcopy(model1)
    back = copy.deepcopy(model2)
    for name in modules_behind(model1, point, example):
        module, replacement = network.get_submodule(name), back.get_submodule(name)
        for own, tensor in [*replacement.named_parameters(recurse=False), *replacement.named_buffers(recurse=False)]:
            setattr(module, own, tensor)
    return StitchedModel(network, point, stitching_layer)


def modules_behind(model: nn.Module, point: StitchPoint, example: Tensor | None = None) -> list[str]:
    """Names of modules whose first call begins after the stitch point; a module that is not called goes with its parent.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 10))
    >>> modules_behind(net, stitch_points(net)[0])
    ['2', '3']
    """
    calls = _trace_calls(model, example)
    behind: list[str] = []
    for name, _ in model.named_modules():
        if name not in calls.began:
            begins_behind = name.rpartition(".")[0] in behind
        else:
            begins_behind = calls.began[name] > calls.ended[point.name]
        if begins_behind:
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
    """Re-estimate batch norm's running statistics under the rounded stitching layer, whose matrix differs from the trained one.

    One pass over batches of images (B, C, H, W) without gradients, with the stitching layer in evaluation mode and all else in
    train mode. Running averages of momentum 0.1 forget all but the last 100 batches. Returns the buffers as they were before,
    for restore_statistics. Modes are put back. (--bn_epoch; the authors' code.)

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    >>> from common.symmetry.stitching_layers import Birkhoff
    >>> stitched = stitch(net, net, 2, Birkhoff(4))
    >>> before = reestimate_statistics(stitched, [torch.randn(8, 3, 32, 32) for _ in range(2)])
    >>> stitched.network[2].num_batches_tracked
    tensor(2)
    >>> restore_statistics(stitched, before)
    >>> stitched.network[2].num_batches_tracked
    tensor(0)
    """
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with _keep_modes(model):
        model.train()
        model.stitching_layer.eval()
        for images in batches:
            model(images)
    return before


@torch.no_grad()
def restore_statistics(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Put buffers back to the values that reestimate_statistics returned."""
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
