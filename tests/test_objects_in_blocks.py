"""Objects made block by block, of images and of volumes: those of the whole."""

import itertools
from functools import partial
from unittest.mock import patch

import numpy as np
import pytest
import torch
from budget import examples
from hypothesis import given
from hypothesis import strategies as st

from unet_fast import label_components, objects
from unet_fast.objects import ObjectRule, label_in_blocks


def in_blocks(states, block, rule):
    """The objects, and their number; stores are written as a whole in turn."""
    stores = [np.full(states.shape, -1, np.int32) for _ in range(2)]
    written = [0, 0]

    def read(index, at):
        assert written[index] == states.size
        return stores[index][at]

    def write(index, at, ids):
        assert ids.dtype == np.int32
        if written[index] == states.size:
            written[index], stores[index] = 0, np.full(states.shape, -1, np.int32)
        assert (stores[index][at] == -1).all()
        stores[index][at] = ids
        written[index] += ids.size

    count = label_in_blocks(
        states.shape,
        block,
        rule,
        lambda at: states[at],
        [(partial(read, index), partial(write, index)) for index in range(2)],
    )
    return stores[0], count


RULES = st.builds(
    ObjectRule,
    min_area=st.sampled_from([0, 2, 5]),
    grow=st.sampled_from([0, 1, 3]),
    levels=st.sampled_from([1, 2, 4]),
    holes=st.sampled_from([0, 1, 6]),
)


@examples(400, deadline=None)
@given(
    shape=st.sampled_from([(30, 30), (9, 10, 12)]).flatmap(
        lambda most: st.tuples(*(st.integers(1, n) for n in most))
    ),
    sides=st.tuples(*[st.integers(1, 12)] * 3),
    density=st.sampled_from([0.2, 0.5, 0.6, 0.7, 0.9, 1.0]),
    rule=RULES,
    reach=st.sampled_from([0, 1, 2, 16]),
    seedless=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 10**6),
)
def test_objects_in_blocks_are_those_of_the_whole(
    shape, sides, density, rule, reach, seedless, seed
):
    """Growth reaches a few pixels only, lest the margin of a block be the whole volume."""
    generator = np.random.default_rng(seed)
    seeds = generator.random(shape) >= seedless
    faint = generator.integers(1, rule.seed, shape)
    states = np.where(generator.random(shape) < density, np.where(seeds, rule.seed, faint), 0)
    with patch.object(objects, "REACH", reach):
        result, count = in_blocks(states, sides[: len(shape)], rule)
        whole = rule.of(states)
    assert np.array_equal(result, whole)
    assert count == whole.max()
    if rule.min_area == 0:  # numbered in the order of first pixels, before they have grown
        ids, first = np.unique(np.where(states == rule.seed, whole, 0), return_index=True)
        assert (np.diff(first[ids > 0]) > 0).all()
    if rule == ObjectRule() and not seedless:
        plain = label_components(torch.from_numpy(states), dims=len(shape))
        assert np.array_equal(whole, plain.numpy())


def margins(rule):
    """How far each stage of growth reaches."""
    return [margin for margin, _ in rule.stages()]


def chain(rule, axes):
    """States in which a pixel depends on one that is as far away along the first axis as can be.

    A seed grows along a line to its last pixel. There it faces another object across a gap; or it
    closes a hole in an object that has the line within, in a shell.
    """
    reached, length = objects.REACH * rule.levels, sum(margins(rule)) + 2
    states = np.zeros((length,) + (5,) * (axes - 1), int)
    steps = np.arange(1, reached + 1)
    line = np.zeros(length, int)
    line[steps] = rule.levels - (steps - 1) // objects.REACH  # from the clearest level on
    line[[0, -1]] = rule.seed
    if rule.holes:
        states[...] = rule.seed
        states[1 : reached + 1, *[slice(1, -1)] * (axes - 1)] = 0
    states[:, *[2] * (axes - 1)] = line
    return states


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(
    "rule", [ObjectRule(levels=2, grow=2), ObjectRule(grow=1), ObjectRule(holes=3)]
)
def test_margins_are_as_small_as_can_be(axes, rule, monkeypatch):
    """Whatever the axis: the pixels that a block begins with depend on those at this distance."""
    stages = rule.stages()
    for axis, stage in itertools.product(range(axes), range(len(stages))):
        states = np.moveaxis(chain(rule, axes), 0, axis)
        block = [5] * axes
        block[axis] = sum(margins(rule)[: stage + 1])
        whole = rule.of(states)
        assert np.array_equal(in_blocks(states, tuple(block), rule)[0], whole)
        narrow = [*stages]
        narrow[stage] = (stages[stage][0] - 1, stages[stage][1])
        with monkeypatch.context() as patched:
            patched.setattr(ObjectRule, "stages", lambda _, narrow=narrow: narrow)
            assert not np.array_equal(in_blocks(states, tuple(block), rule)[0], whole)


def test_a_tunnel_is_no_hole():
    """In a volume a hole is enclosed along three axes; the planes of one would each have one."""
    mask = np.ones((3, 3, 3), int)
    mask[1, 1, 1] = 0
    assert ObjectRule(holes=1).of_mask(mask).all()
    mask[0, 1, 1] = 0
    found = ObjectRule(holes=2).of_mask(mask)
    assert np.array_equal(found, mask)
    assert ObjectRule(holes=1).of_mask(mask[1]).all()
