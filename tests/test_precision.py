"""What --precision and --deterministic mean, what is never rounded, and what a GPU needs besides: tested without one."""

import copy
import importlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import routing_networks
from common import checkpoint, parallel, precision
from common.datasets.augmentation import Preprocessing
from common.errors import InputError
from common.models import deterministic, zoo
from common.models.image_transformer import ImageTransformer, cross_entropy
from common.models.pooling import FAST_POOLINGS, causal_pool
from common.models.resnet import CifarResNet
from common.models.sets import MODEL_TYPES, make_set_model
from common.precision import OPERATORS, PRECISIONS, STRICT, TF32, autocast, set_backend_flags, strict_fp32
from common.run.clock import Clock
from common.run.memory import is_out_of_memory
from common.ssl import transformations
from common.ssl.duet import DUET
from common.symmetry.measures import MEASURES
from common.symmetry.similarity import layer_similarities, similarity
from common.symmetry.stitching import stitch
from common.symmetry.stitching_layers import Birkhoff
from common.symmetry.train import make_optimizers
from common.symmetry.train import training_step as stitching_step
from common.zoo import training
from tests.small_images import smooth

# a line of each script that trains, as short as its options allow
SCRIPTS = {
    "amortised_clustering": "-type Swarm",
    "swarm_transformer": "-data MNIST",
    "train_ssl": "--model simclr --tx sca",
    "train_zoo": "--arch mCNN",
    "cifar10_stitching": "--arch mCNN",
    "cifar10_projections": "",
    "routing_networks": "",
    "deepsets_exercise": "",
}


@pytest.fixture(autouse=True)
def flags_as_before() -> Iterator[None]:
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    set_backend_flags("fp32")
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def flags() -> tuple[str, ...]:
    return tuple(operator.fp32_precision for operator in OPERATORS)


class Seen(TorchDispatchMode):
    """Notes of all products and convolutions the dtype and the flags under which they ran; `refused` operators raise."""

    PRODUCTS = (
        "mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "convolution", "convolution_backward", "affine_grid_generator",
    )  # fmt: skip

    def __init__(self, refused: tuple[str, ...] = ()):
        super().__init__()
        self.refused = refused
        self.products: set[tuple[torch.dtype, tuple[str, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        if name in self.PRODUCTS:
            self.products.add((args[0].dtype, flags()))
        result = out[0] if isinstance(out, tuple) else out
        if name in self.refused and result.is_floating_point():
            raise AssertionError(f"{func} has no deterministic kernel")
        return out


# ---- the flags -----------------------------------------------------------------------------------------------------------


def test_flags_of_each_precision() -> None:
    for name in (*PRECISIONS, *reversed(PRECISIONS)):
        set_backend_flags(name)
        tf32 = name == "tf32"
        assert flags() == (TF32 if tf32 else STRICT)
        # PyTorch itself asks for these, and raises where they contradict the flags
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == tf32
    with pytest.raises(ValueError, match="unknown precision 'fp16': choose from fp32, tf32, bf16"):
        set_backend_flags("fp16")


def test_flags_of_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    for before, after in ((None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        if before is not None:
            monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
        set_backend_flags("fp32", deterministic=True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after
        assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        assert cudnn.deterministic and not cudnn.benchmark
    set_backend_flags("fp32")
    assert not torch.are_deterministic_algorithms_enabled() and not cudnn.deterministic and not cudnn.benchmark


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_set_the_flags_before_anything_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, called = importlib.import_module(name), []

    def record(*args: Any, **options: Any) -> None:
        called.append((args, options))
        raise InterruptedError

    monkeypatch.setattr(script, "set_backend_flags", record)
    monkeypatch.chdir(tmp_path)
    dash = "-" if name in ("amortised_clustering", "swarm_transformer") else "--"
    with pytest.raises(InterruptedError):
        script.main([*SCRIPTS[name].split(), f"{dash}precision", "bf16", f"{dash}deterministic"])
    assert called == [(("bf16",), {"deterministic": True})] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_tf32_is_refused_on_a_cpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    dash = "-" if name in ("amortised_clustering", "swarm_transformer") else "--"
    line = [*SCRIPTS[name].split(), f"{dash}precision", "tf32"]
    with pytest.raises(SystemExit) as stopped:
        script.main(line)
    told = capsys.readouterr()
    assert stopped.value.code == 2 and told.err.count("\n") == 1
    assert f"{dash}precision tf32 is a format of NVIDIA GPUs" in told.err and not list(tmp_path.iterdir())
    assert script.main([*line, "-dry_run" if dash == "-" else "--dry-run"]) == 0  # the run may be elsewhere


def test_an_lstm_in_bf16_is_refused_on_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = importlib.import_module("amortised_clustering")
    line = ["-type", "LSTMS", "-precision", "bf16", "-dry_run"]
    assert script.main(line) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.main([*line, "-device", "cpu"]) == 0
    with pytest.raises(SystemExit) as stopped:
        script.main(line)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and "-type LSTMS -precision bf16: autocast makes" in told and told.count("\n") == 1


# ---- what is never rounded -----------------------------------------------------------------------------------------------


def test_strict_fp32_ends_as_it_began() -> None:
    user = ("tf32", "ieee", "ieee", *STRICT[3:])  # set by the user, operator by operator
    for before in (STRICT, TF32, user):
        for operator, value in zip(OPERATORS, before, strict=True):
            operator.fp32_precision = value
        with strict_fp32():
            with strict_fp32():
                pass
            assert flags() == STRICT
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert flags() == before
    set_backend_flags("tf32")
    with pytest.raises(ZeroDivisionError), strict_fp32():
        raise ZeroDivisionError
    assert flags() == TF32


def test_views_similarities_and_accuracies_are_strict_where_training_takes_tf32() -> None:
    set_backend_flags("tf32")
    images = torch.rand(4, 3, 16, 16)
    boxes, degrees = torch.tensor([[0.0, 0, 9, 9]]).expand(4, 4), torch.arange(4.0)
    for view in (lambda: transformations.crop_and_resize(images, boxes, 8), lambda: transformations.rotate(images, degrees)):
        with Seen() as seen:
            view()
        assert seen.products == {(torch.float32, STRICT)}

    features = torch.rand(9, 3, 4)
    for measure in MEASURES:
        with Seen() as seen:
            similarity(measure, features, features)
            layer_similarities(measure, lambda part: [features[part]], lambda part: [features[part]], 9)
        assert {setting for _, setting in seen.products} == {STRICT}

    model, labels = zoo.make("mCNN", width=2), torch.arange(8) % 2
    data = smooth(8, (3, 32, 32))
    for name, expected in (("fp32", STRICT), ("tf32", TF32)):
        with Seen() as seen:
            training.evaluate(model, data, Preprocessing("CIFAR10", torch.device("cpu")), name)
        assert seen.products == {(torch.float32, expected)}
    optimizer = training.make_optimizer(model, "fast", 0.01)
    with Seen() as seen:
        training.training_step(model, optimizer, torch.randn(8, 3, 32, 32), labels, "tf32")
    assert seen.products == {(torch.float32, TF32)}


def test_bf16_rounds_products_alone() -> None:
    torch.manual_seed(0)
    set_backend_flags("bf16")
    model, labels = zoo.make("mCNN", width=2).train(), torch.arange(8) % 2
    optimizer = training.make_optimizer(model, "fast", 0.01)
    with Seen() as seen:
        metrics = training.training_step(model, optimizer, torch.randn(8, 3, 32, 32), labels, "bf16")
    assert seen.products == {(torch.bfloat16, STRICT)}
    assert metrics["loss"].dtype == torch.float32 and metrics["loss"].bfloat16().float() != metrics["loss"]
    for tensor in (*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())):
        assert tensor.dtype in (torch.float32, torch.int64)
    for moments in optimizer.state.values():
        assert {moment.dtype for moment in moments.values()} == {torch.float32}


def test_a_method_in_bf16_has_views_and_losses_in_float32() -> None:
    script = importlib.import_module("train_ssl")
    line = "--tx sca rot --equi-tx rot --duet-bins 4 --encoder-width 2 --image-size 8 --precision bf16"
    args, _ = script.parse(script.get_parser(), line.split())
    model = script.make_model(args, torch.device("cpu"))
    data = smooth(6, (3, 8, 8))
    batch = model.make_batch(data.images, data.labels, torch.arange(6), torch.Generator().manual_seed(0), training=True)
    assert all(view.dtype == torch.float32 and not view.equal(view.bfloat16().float()) for view in batch.views)
    with Seen() as seen:
        loss, metrics = script.loss_of(args, model, batch, training=True)
    assert (torch.bfloat16, flags()) in seen.products
    assert {loss.dtype, *(metric.dtype for metric in metrics.values())} == {torch.float32}
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


# ---- determinism ---------------------------------------------------------------------------------------------------------


def test_running_sums_are_torchs() -> None:
    for shape, dim in (((3, 1, 2), 1), ((2, 7, 3), 1), ((4, 5, 16), 2), ((2, 100), 1), ((2, 0), 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weights, expected = torch.randn(shape, dtype=torch.float64), x.cumsum(dim)
        (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
        torch.use_deterministic_algorithms(True)
        with Seen(refused=("cumsum",)):
            sums = deterministic.cumsum(x, dim)
            (own,) = torch.autograd.grad((sums * weights).sum(), x)
        torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(sums, expected, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(own, gradient, rtol=1e-13, atol=1e-13)


def test_poolings_with_running_sums_do_not_change() -> None:
    h, mask = torch.randn(3, 9, 4, dtype=torch.float64), torch.rand(3, 9) < 0.7
    pooling = FAST_POOLINGS["CAUSAL"](mask, h.dtype)
    results = []
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag)
        p, dh = torch.empty(4, 3, 9, dtype=torch.float64), torch.zeros(4, 3, 9, dtype=torch.float64)
        pooling.pool(h.permute(2, 0, 1), p)
        pooling.add_grad(dh, h.permute(2, 0, 1), h.permute(2, 0, 1))
        results.append((causal_pool(h, mask), p, dh))
    torch.testing.assert_close(results[0], results[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("settings", [{"kernel_size": 2}, {"kernel_size": 4}, {"kernel_size": 3, "stride": 2, "padding": 1}])
def test_max_pooling_is_torchs_also_with_equal_values(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (2, 3, 8, 8)).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = F.max_pool2d(x, **settings)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.use_deterministic_algorithms(True)
    for pool in (lambda x: deterministic.max_pool2d(x, **settings), deterministic.MaxPool2d(**settings)):
        pooled = pool(x)
        (own,) = torch.autograd.grad((pooled * weights).sum(), x)
        assert pooled.equal(expected)
        torch.testing.assert_close(own, gradient, rtol=1e-14, atol=1e-14)


# of those that the models could use: PyTorch refuses them on CUDA under deterministic algorithms
NOT_DETERMINISTIC = (
    "cumsum", "max_pool2d_with_indices_backward", "_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward",
    "upsample_bilinear2d_backward", "grid_sampler_2d_backward", "reflection_pad2d_backward", "nll_loss2d_forward",
    "_embedding_bag_backward", "histc", "put_", "median", "kthvalue",
)  # fmt: skip


def set_step(kind: str, **options: Any) -> Callable[[], Tensor]:
    return lambda: make_set_model(kind, 2, 3, n_hidden=12, n_heads=2, **options)(torch.randn(2, 5, 2)).square().mean()


def image_step() -> Tensor:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    model = ImageTransformer(shape=(3, 4, 4), n_hidden=8, n_iter=2, n_classes=2, learn_loc=True)
    return cross_entropy(model(images, torch.arange(2)), images).mean()


def zoo_step(arch: str) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model = zoo.make(arch, 10, *([2] if arch in zoo.CNNS else []))
        return F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))

    return step


def duet_step() -> Tensor:
    encoder = CifarResNet((1, 1, 1), in_channels=1, width=2)
    model, data = DUET(encoder, ("sca", "rot"), 8, n_classes=3, bins=4, structure="rot", target="vm"), smooth(6, (1, 10, 10))
    batch = model.make_batch(data.images, data.labels % 3, torch.arange(6), torch.Generator().manual_seed(0), training=True)
    return model.loss(model(batch.views), batch, training=True)[0]


def routing_step(decision: str) -> Callable[[], Tensor]:
    def step() -> Tensor:
        line = f"--data MNIST-MTL --width 4 --modules 3 --decision {decision}"
        args, _ = routing_networks.parse(routing_networks.get_parser(), line.split())
        images, tasks = torch.randn(6, 1, 32, 32), torch.arange(6) % 3
        model = routing_networks.make_model(args, SimpleNamespace(train=SimpleNamespace(images=images), n_tasks=3, n_labels=2))
        _, module_loss, routing_loss, _ = routing_networks.forward(args, model, images, tasks, tasks % 2)
        return module_loss + routing_loss

    return step


STEPS = {
    **{kind: set_step(kind) for kind in MODEL_TYPES},
    "POMA": set_step("Swarm", pooling="POMA"),
    "images": image_step,
    **{arch: zoo_step(arch) for arch in ("mCNN", "cct_2_3x2_32", "resnet20")},
    "DUET": duet_step,
    **{decision: routing_step(decision) for decision in routing_networks.DECISIONS},
}


@pytest.mark.parametrize("name", STEPS)
def test_no_step_needs_what_has_no_deterministic_kernel(name: str) -> None:
    losses = []
    for flag in (False, True):
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(flag)
        with Seen(refused=NOT_DETERMINISTIC if flag else ()):
            loss = STEPS[name]()
            loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_nor_does_stitching() -> None:
    torch.use_deterministic_algorithms(True)
    network, layer = zoo.make("mCNN", 10, 2), Birkhoff(2, alpha=0.1)
    stitched = stitch(network, network, 3, layer).train()
    with Seen(refused=NOT_DETERMINISTIC):
        stitching_step(stitched, torch.randn(4, 3, 32, 32), torch.arange(4), make_optimizers(layer, 0.01)[0])


# ---- checkpoints, memory, processes, seconds -----------------------------------------------------------------------------


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, with its values on the CPU."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device="cuda:0")

    def __init__(self, values: Tensor):
        self.values = values

    def cpu(self) -> Tensor:
        return self.values

    def __reduce_ex__(self, protocol: int) -> Any:
        raise AssertionError("a tensor of a GPU is written to a file")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def on_gpu(state: Any) -> Any:
    if isinstance(state, Tensor):
        return OnGpu(state)
    if isinstance(state, dict):
        state = copy.copy(state)
        for name, value in state.items():
            state[name] = on_gpu(value)
        return state
    return type(state)(map(on_gpu, state)) if isinstance(state, list | tuple) else state


def test_checkpoints_hold_tensors_of_the_cpu(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": (torch.get_rng_state(), [1, "x", None])}
    checkpoint.save(on_gpu(state), tmp_path / "gpu.pkl")
    loaded = torch.load(tmp_path / "gpu.pkl")  # as anybody would
    for name, value in loaded["model"].items():
        assert value.device.type == "cpu" and value.equal(state["model"][name])
    assert loaded["model"]._metadata == state["model"]._metadata and loaded["rng"][1] == [1, "x", None]
    for index, moments in loaded["optimizer"]["state"].items():
        assert moments["exp_avg"].equal(state["optimizer"]["state"][index]["exp_avg"])
    optimizer.load_state_dict(loaded["optimizer"])
    model.load_state_dict(loaded["model"])


def test_what_is_on_the_cpu_is_written_as_it_is(tmp_path: Path) -> None:
    weight = torch.randn(3)
    state = {"model": nn.BatchNorm1d(3).state_dict(), "shared": [weight, weight[:2]], "numbers": (1, 2.5)}
    assert checkpoint.on_cpu(state) is state
    checkpoint.save(state, tmp_path / "cpu.pkl")
    plain = io.BytesIO()
    torch.save(state, plain)
    read = (checkpoint.read(tmp_path / "cpu.pkl"), torch.load(io.BytesIO(plain.getvalue())))
    assert (tmp_path / "cpu.pkl").stat().st_size == len(plain.getvalue())
    for loaded in read:
        assert loaded["shared"][0].data_ptr() == loaded["shared"][1].data_ptr()  # one storage


OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'", 2),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    MemoryError(),
)
OTHER_ERRORS = (
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    ValueError("CUDA out of memory"),
    RecursionError("memory"),
)


def test_out_of_memory_is_recognised_in_all_its_forms_and_nothing_else() -> None:
    assert [error for error in OUT_OF_MEMORY if not is_out_of_memory(error)] == []
    assert [error for error in OTHER_ERRORS if is_out_of_memory(error)] == []


def test_a_contrastive_batch_that_does_not_fit_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, data = importlib.import_module("train_ssl"), smooth(20, (3, 36, 36))

    def too_large(*_: object, **__: object) -> None:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(script, "load_splits", lambda *_, **__: script.Data(data, data, "x"))
    monkeypatch.setattr(script, "loss_of", too_large)
    line = "--tx sca rot --equi-tx rot --encoder-width 2 --duet-bins 4 --batch-size 10 --image-size 32 --epochs 1"
    with pytest.raises(SystemExit) as stopped:
        script.main([*line.split(), "--encoder", "cifar10_resnet20", "--results-dir", str(tmp_path)])
    told = capsys.readouterr().err
    expected = "train_ssl.py: failed: out of memory; less is needed with --precision bf16, a smaller --batch-size, or torchrun"
    assert stopped.value.code == 1 and expected in told and told.count("\n") == 1
    (log,) = tmp_path.rglob("log")
    assert log.read_text().splitlines()[-1] == "failed: out of memory"


def test_a_process_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.local_device("cuda") == torch.device("cuda")  # without torchrun
    for name, value in {"RANK": 5, "LOCAL_RANK": 2, "WORLD_SIZE": 6, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert parallel.local_device("cpu") == torch.device("cpu")
    message = "process 2 of torchrun has no GPU, this machine has 2: --nproc-per-node=2"
    with pytest.raises(InputError, match=message), parallel.process_group("cuda"):
        pass
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module("train_ssl").main(["--model", "simclr", "--tx", "sca"])
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and message in told and told.count("\n") == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert parallel.local_device("cuda") == torch.device("cuda", 1)


def test_seconds_are_read_when_the_gpu_is_done_and_the_budget_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[None] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    clock = Clock(budget=100)
    assert not clock.is_up() and clock.left() <= 100 and not waits
    assert clock.used() >= 0 and len(waits) == 1
    with clock.paused():
        assert len(waits) == 2
    assert clock.state_dict()["seconds"] >= 0 and len(waits) == 3


def test_autocast_takes_the_device_of_the_tensor() -> None:
    for name in PRECISIONS:
        assert autocast(torch.ones(1), name)._enabled == (name == "bf16") and autocast(torch.ones(1), name).device == "cpu"
    assert precision.__doc__ is not None and all(f"| {name} |" in precision.__doc__ for name in PRECISIONS)
