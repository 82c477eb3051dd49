"""What lies between a policy's actions and an environment's."""

import numpy as np
import pytest

from defi.benchmarks.adapters import (
    StickyGripper,
    adapt,
    euler_to_rotation_vector,
    gripper_binary,
    gripper_signed,
    gripper_unsigned,
    repeat,
    rotation_vector_to_euler,
    split,
)
from defi.errors import UserError


def matrix(axis: int, angle: float) -> np.ndarray:
    """Turn about a coordinate axis."""
    c, s = np.cos(angle), np.sin(angle)
    turn = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    turn[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return turn


def rodrigues(vector: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def test_euler_angles_are_about_fixed_axes_in_the_order_x_y_z():
    rng = np.random.default_rng(0)
    euler = rng.uniform(-1.4, 1.4, (20, 3))
    vectors = euler_to_rotation_vector(euler)
    for (roll, pitch, yaw), vector in zip(euler, vectors):
        expected = matrix(2, yaw) @ matrix(1, pitch) @ matrix(0, roll)
        np.testing.assert_allclose(rodrigues(vector), expected, atol=1e-12)
    np.testing.assert_allclose(rotation_vector_to_euler(vectors), euler, atol=1e-12)


def test_gripper_conventions():
    assert [gripper_binary(openness) for openness in (0.0, 0.5, 0.51, 1.0)] == [-1, -1, 1, 1]
    assert [gripper_signed(openness) for openness in (0.0, 0.5, 1.0)] == [-1, 0, 1]
    assert gripper_unsigned(gripper_signed(0.3)) == pytest.approx(0.3)


def test_a_sticky_gripper_holds_a_change_and_begins_no_other():
    sticky = StickyGripper(steps=3)
    given = [1, 1, 0, 0, 1, 1, 1, 1, 0.4, 0.0, 0.0]
    #        –  –  closes, held …; the opening at 4 comes too early; 0.4 and 0.0: the first is 0.6 away
    assert [sticky(openness) for openness in given] == [0, 0, 1, 1, 1, 0, 0, 0, 0.6, 0.6, 0.6]
    slow = StickyGripper(steps=3)  # changes of half or less are passed on and not held
    assert np.allclose([slow(openness) for openness in (1, 0.75, 0.5, 0, 0)], [0, 0.25, 0.25, 0.5, 0])


def test_slower_policies_hold_places_and_split_changes():
    action = np.array([0.3, 0, 0, 0, 0, 0.6, 1.0])
    assert [each.tolist() for each in repeat(3, action)] == [action.tolist()] * 3
    parts = split(3, action)
    np.testing.assert_allclose(np.sum(parts, axis=0)[:6], action[:6])
    assert [part[6] for part in parts] == [1.0] * 3


def test_adapters_follow_each_other_and_forget_between_episodes():
    chunk = np.array([[1, 0, 0, 0, 0, np.pi / 2, 1.0], [0, 0, 0, 0, 0, 0, 0.0], [0, 0, 0, 0, 0, 0, 0.0]])
    act = adapt(["euler_to_rotation_vector", "sticky_gripper:2", "split:2"])
    actions = np.stack(list(act(chunk)))
    assert actions.shape == (6, 7) and actions[:, 6].tolist() == [0, 0, 1, 1, 1, 1]
    np.testing.assert_allclose(actions[0, :6], [0.5, 0, 0, 0, 0, np.pi / 4])
    assert chunk[0, 5] == np.pi / 2  # what was given stays as it is
    again = np.stack(list(adapt(["euler_to_rotation_vector", "sticky_gripper:2", "split:2"])(chunk)))
    np.testing.assert_array_equal(again, actions)


def test_what_is_not_carried_out_is_not_remembered():
    act = adapt(["sticky_gripper:5"])
    open_, closed = np.array([0, 0, 0, 0, 0, 0, 1.0]), np.array([0, 0, 0, 0, 0, 0, 0.0])
    actions = act(np.stack([open_, closed]))
    assert next(actions)[6] == 0  # the rest of the chunk is dropped
    assert next(act(np.stack([open_])))[6] == 0
    assert next(act(np.stack([closed])))[6] == 1


@pytest.mark.parametrize("name", ["turn", "repeat:0", "repeat:two", "gripper_flipped:2", ""])
def test_wrong_names_are_one_line(name: str):
    with pytest.raises(UserError, match="^adapters="):
        adapt([name])
