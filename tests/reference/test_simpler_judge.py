"""SIMPLER's judge against the official one's answers: made-up states, and all steps of recorded episodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simpler_recordings import Recording, link_poses, recordings, simpler_root

from defi.benchmarks.simpler.episodes import TASKS
from defi.benchmarks.simpler.judge import Contact, Judge, PickUp, PutOn, Settled, State, judge_of

DESCRIPTIONS = "ManiSkill2_real2sim/mani_skill2_real2sim/assets/descriptions"


def robot_links(reference: Path, task: str) -> set[str]:
    file = reference / "simpler/robot_links.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    robots = json.loads(file.read_text())
    return {
        link["name"]
        for link in robots["widowx" if task.startswith("widowx") else "google_robot_static"]["links"]
    }


def settled_of(case: dict[str, Any], robot: set[str]) -> Settled:
    constants = case["constants"]
    centres = {name: np.array(pose["p"]) for name, pose in constants["actor_cmass_local_pose"].items()}
    if "obj_height_after_settle" in constants:
        (name,) = centres
        return Settled(
            name, name, {name: np.array([0, 0, constants["obj_height_after_settle"]])}, centres, robot=robot
        )
    source, target = constants["source"], constants["target"]
    return Settled(
        source,
        target,
        dict(zip(constants["objects_in_order"], np.array(constants["episode_obj_xyzs_after_settle"]))),
        centres,
        {
            target: np.array(constants["episode_target_obj_bbox_world"]),
            source: np.array(constants["episode_source_obj_bbox_world"]),
        },
        robot,
    )


def state_of(case: dict[str, Any]) -> State:
    state = case["state"]
    if "cabinet_qpos" in state:
        return State(drawer=state["cabinet_qpos"][state["drawer_joint"]])
    contacts = [Contact(c["actor0"], c["actor1"], np.sum(c["point_impulses"], 0)) for c in state["contacts"]]
    fingers = {name: np.array(pose) for name, pose in state["finger_link_poses"].items()}
    return State({name: np.array(pose) for name, pose in state["actor_poses"].items()}, contacts, fingers)


def remembering(judge: Judge, before: dict[str, Any]) -> None:
    if isinstance(judge, PutOn | PickUp):
        judge.held_for = before["consecutive_grasp"]
    if isinstance(judge, PutOn):
        judge.ever = {name: before["episode_stats"][name] for name in judge.ever}
    if isinstance(judge, PickUp):
        judge.lifted, judge.stats = before["lifted_obj"], before["episode_stats"]


def test_all_judged_states(reference: Path) -> None:
    file = reference / "simpler/judge_cases.json"
    if not file.is_file():
        pytest.skip(f"no {file}")
    cases = json.loads(file.read_text())["cases"]
    for case in cases:
        task = TASKS[case["task"]]
        drawer = task.kind in ("open", "close")
        judge = judge_of(task, None if drawer else settled_of(case, robot_links(reference, task.name)))
        remembering(judge, case["counters_before"])
        assert judge(state_of(case)) == case["verdict"], case["id"]
        if isinstance(judge, PutOn | PickUp):
            after = case["counters_after"]
            assert judge.held_for == after["consecutive_grasp"], case["id"]
            assert getattr(judge, "lifted", None) == after.get("lifted_obj"), case["id"]


def settled_in(recording: Recording, robot: set[str]) -> Settled:
    meta, names = recording.meta, recording.actor_names
    centres = {name: np.array(pose["p"]) for name, pose in zip(names, meta["actor_cmass_local_pose"])}
    if recording.task.kind == "pick":
        return Settled(names[0], names[0], {names[0]: recording.actors[0, 0, :3]}, centres, robot=robot)
    info = meta["reset_info"]
    source, target = info["episode_source_obj_name"], info["episode_target_obj_name"]
    boxes = {target: meta["episode_target_obj_bbox_world"], source: meta["episode_source_obj_bbox_world"]}
    places = dict(zip(info["episode_model_ids"], np.array(meta["episode_obj_xyzs_after_settle"])))
    return Settled(
        source, target, places, centres, {name: np.array(box) for name, box in boxes.items()}, robot
    )


def test_every_step_of_the_recorded_episodes(reference: Path) -> None:
    root = simpler_root(reference) / DESCRIPTIONS
    urdfs = {
        "widowx": root / "widowx_description/wx250s.urdf",
        "google": root / "googlerobot_description/google_robot_meta_sim_fix_wheel_fix_fingertip.urdf",
    }
    judged = 0
    for recording in recordings(reference):
        meta, task = recording.meta, recording.task
        if task.kind in ("open", "close"):
            judge, drawers = judge_of(task, None), meta["cabinet_joint_names"]
        else:
            judge = judge_of(task, settled_in(recording, robot_links(reference, task.name)))
        base = (*meta["robot_base_pose"]["p"], *meta["robot_base_pose"]["q"])
        for row, expected in enumerate(recording.info, start=1):
            if task.kind in ("open", "close"):
                joint = drawers.index(f"{task.drawer}_drawer_joint")
                state = State(drawer=float(recording.cabinet_qpos[row, joint]))
            else:
                joints = dict(zip(recording.joint_names, recording.qpos[row]))
                fingers = link_poses(urdfs[task.robot_kind], base, joints)
                objects = dict(zip(recording.actor_names, recording.actors[row].astype(float)))
                state = State(objects, recording.contacts_of(row), fingers)
            expected = {name: value for name, value in expected.items() if name != "elapsed_steps"}
            assert judge(state) == expected, (recording.name, row)
            judged += 1
    assert judged
