"""The schedule of mixed-resolution training."""

import math
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfu_diffusers.data.resolutions import MixedResolutionBatchSampler, parse_resolution, source_size

SIZES = [(16, 16), (24, 24), (32, 48)]


def test_every_micro_batch_has_one_size_and_every_epoch_each_image_once():
    batches = list(MixedResolutionBatchSampler(10, 4, SIZES, num_steps=50, seed=3, max_pixels=3 * 32 * 48))
    assert all(len({draw.size for draw in batch}) == 1 for batch in batches)
    draws = list(chain(*batches))
    assert [draw.number for draw in draws] == list(range(200))
    epochs = [[draw.index for draw in draws[i : i + 10]] for i in range(0, 200, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_resolutions_follow_their_weights():
    sampler = MixedResolutionBatchSampler(10, 1, SIZES, weights=[1, 3, 0], num_steps=4000)
    drawn = [sampler.resolution(step) for step in range(4000)]
    assert drawn.count(SIZES[2]) == 0
    assert abs(drawn.count(SIZES[1]) / 4000 - 0.75) < 0.03  # more than four standard deviations


def test_a_resumed_sampler_continues_where_it_was():
    sampler = MixedResolutionBatchSampler(7, 3, SIZES, num_steps=20, max_pixels=2 * 32 * 48)
    rest = MixedResolutionBatchSampler(7, 3, SIZES, num_steps=20, first_step=12, max_pixels=2 * 32 * 48)
    assert list(rest) == list(chain(*(sampler.micro_batches(step) for step in range(12, 20))))


@settings(max_examples=40, deadline=None)
@given(
    processes=st.sampled_from([1, 2, 3, 4, 6, 12]),
    max_pixels=st.integers(32 * 48, 40 * 32 * 48),
    seed=st.integers(0, 9),
)
def test_processes_share_each_step_and_agree_on_it(processes, max_pixels, seed):
    options = dict(num_steps=6, seed=seed)
    whole = MixedResolutionBatchSampler(20, 12, SIZES, **options)
    shares = [
        MixedResolutionBatchSampler(
            20, 12, SIZES, **options, max_pixels=max_pixels, rank=rank, num_processes=processes
        )
        for rank in range(processes)
    ]
    for step in range(6):
        assert {share.resolution(step) for share in shares} == {whole.resolution(step)}
        parts = [share.micro_batches(step) for share in shares]
        assert list(chain(*chain(*parts))) == whole.micro_batches(step)[0]
        assert len({len(part) for part in parts}) == 1, "processes would wait for each other"
        for batch in chain(*parts):
            assert len(batch) * math.prod(batch[0].size) <= max_pixels
        counts = [len(batch) for batch in parts[0]]
        assert max(counts) - min(counts) <= 1
        assert len(counts) == math.ceil(sum(counts) / (max_pixels // math.prod(whole.resolution(step))))
    for share in shares:
        assert len(share) == len(list(share))


def test_upsampled_sizes_take_their_share_and_load_smaller_images():
    sampler = MixedResolutionBatchSampler(
        50, 2, [(48, 48), (96, 96)], [0, 1], upsample_resolutions=[(160, 160), (200, 100)], upsample_weight=0.3,
        num_steps=3000,
    )  # fmt: skip
    sizes = [sampler.resolution(step) for step in range(3000)]
    for upsampled in ((160, 160), (200, 100)):
        assert abs(sizes.count(upsampled) / 3000 - 0.15) < 0.03
    assert sampler.micro_batches(sizes.index((160, 160)))[0][0].size == (96, 96)
    assert sampler.micro_batches(sizes.index((200, 100)))[0][0].size == (136, 68)
    assert sampler.micro_batches(sizes.index((96, 96)))[0][0].size == (96, 96)


def test_a_source_is_never_larger_than_its_target():
    assert source_size((8, 8), [(32, 32)]) == (8, 8)
    assert source_size((1, 900), [(4, 4)]) == (1, 120)


@pytest.mark.parametrize("first", [0, 150])
def test_expected_steps_are_about_what_is_drawn(first):
    sampler = MixedResolutionBatchSampler(
        10, 1, [(32, 48), (16, 16), (24, 24), (8, 8)], [2, 1, 1, 0], upsample_resolutions=[(64, 64)],
        upsample_weight=0.3, num_steps=1000, first_step=first,
    )  # fmt: skip
    drawn, expected = Counter(sampler.resolution(step) for step in range(first, 1000)), sampler.expected_steps()
    assert sum(expected.values()) == pytest.approx(1000 - first) and (8, 8) not in expected
    for size in drawn | expected:  # four standard deviations of as many throws of a coin
        assert abs(drawn[size] - expected[size]) < 4 * (0.25 * (1000 - first)) ** 0.5


def test_a_stream_counts_its_images():
    (batch,) = MixedResolutionBatchSampler(None, 4, SIZES, num_steps=8, first_step=7)
    assert [draw.index for draw in batch] == [draw.number for draw in batch] == [28, 29, 30, 31]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(length=0), "no image"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(num_processes=3), "batch_size=4 cannot be shared equally by 3"),
        (dict(weights=[1, 2]), "3 resolutions"),
        (dict(weights=[0, 0, 0]), "not all 0"),
        (dict(weights=[1, -1, 1]), "at least 0"),
        (dict(weights=[1, math.nan, 1]), "at least 0"),
        (dict(max_pixels=1000), "less than one image of the largest size, 1536"),
        (dict(upsample_weight=0.3), "upsample_weight=0.3"),
        (dict(upsample_resolutions=[(64, 64)]), "upsample_weight=0"),
        (dict(upsample_resolutions=[(64, 64)], upsample_weight=1.0), "between 0 and 1"),
    ],
)
def test_bad_sampler_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedResolutionBatchSampler(**{"length": 10, "batch_size": 4, "resolutions": SIZES, **arguments})


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "12x", "x12", "1.5", "3x4x5", "big"])
def test_bad_resolutions(text):
    with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
        parse_resolution(text)
