"""Preprocessing of small images against reference values; draws of an epoch; validation split; schedules."""

from collections import Counter

import pytest
import torch

from common.datasets import images
from common.datasets.augmentation import MEAN, STD, Preprocessing, as_rgb_32, draw_epoch, flip_and_translate
from common.run.schedule import halving, one_cycle
from common.seeds import generator_of, seed_of
from tests.reference import Vectors, assert_agrees
from tests.small_images import real, smooth


def test_preprocessing_is_the_originals() -> None:
    v = Vectors("modelsym/preprocessing")
    pixels = v["images"].permute(0, 3, 1, 2)
    preprocessing = Preprocessing("CIFAR10")
    assert_agrees(preprocessing.normalise(pixels), v["normalized"], 1e-6)
    assert preprocessing.fill.tolist() == v["fill"].tolist()
    flip, offset = v["flip"].bool(), v["offset_yx"]
    expected = v["augmented"].permute(0, 3, 1, 2)
    assert torch.equal(flip_and_translate(pixels, flip, offset, preprocessing.fill), expected)
    black = torch.zeros(3, dtype=torch.uint8)
    expected_black = v["augmented_zero_fill"].permute(0, 3, 1, 2)
    assert torch.equal(flip_and_translate(pixels, flip, offset, black), expected_black)
    assert torch.equal(preprocessing.augment(pixels, flip, offset), preprocessing.normalise(expected))


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_constants_are_those_of_the_real_images(name: str) -> None:
    data = as_rgb_32(real(name, "train"))
    assert data.images.shape == (60_000, 3, 32, 32) and not data.images[:, :, :2].any()
    pixels = data.images[:, 0].double()
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((MEAN[name][0], STD[name][0]), abs=1e-3)
    assert torch.equal(data.images[0, 0], data.images[0, 2])


def test_coloured_images_stay_as_they_are() -> None:
    data = smooth(4, (3, 32, 32))
    assert torch.equal(as_rgb_32(data).images, data.images)


def test_draws_are_uniform_and_a_function_of_the_key() -> None:
    order, flip, offset = draw_epoch(5000, generator_of(1, 2))
    assert sorted(order.tolist()) == list(range(5000))
    assert abs(flip.float().mean().item() - 0.5) < 0.03
    counts = Counter(map(tuple, offset.tolist()))
    assert len(counts) == 25 and all(130 < count < 270 for count in counts.values())  # 200 +- 5 standard deviations
    again, other = draw_epoch(5000, generator_of(1, 2))[0], draw_epoch(5000, generator_of(1, 3))[0]
    assert torch.equal(order, again) and not torch.equal(order, other)
    assert len({seed_of(seed, i) for seed in range(30) for i in range(30)}) == 900


def test_validation_split() -> None:
    data = smooth(95)
    training, validation = images.split_validation(data, 3)
    assert (len(training), len(validation)) == (86, 9)
    keys = [image.numpy().tobytes() for image in torch.cat([training.images, validation.images])]
    assert sorted(keys) == sorted(image.numpy().tobytes() for image in data.images)
    assert torch.equal(images.split_validation(data, 3)[1].images, validation.images)
    assert not torch.equal(images.split_validation(data, 4)[1].images, validation.images)
    with pytest.raises(images.DataError, match="at least 10"):
        images.split_validation(smooth(9), 0)


def test_schedules() -> None:
    # as published: StepLR every 12 epochs of 50
    scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 12, 0.5)
    for epoch in range(50):
        assert halving(epoch, 50) == scheduler.get_last_lr()[0]
        scheduler.optimizer.step()
        scheduler.step()
    assert [halving(epoch, 3) for epoch in range(3)] == [1, 0.5, 0.25]
    assert [one_cycle(p, 0.2) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
