"""Whether SIMPLER can run here: the package, a Vulkan driver that draws, the assets.

A driver that crashes takes only a process of its own along.
"""

import signal
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from defi.benchmarks.simpler.episodes import RULES, Episode, Task
from defi.benchmarks.simpler.robots import ROBOTS
from defi.benchmarks.simpler.scene import DATA
from defi.errors import UserError

PATIENCE = 300  # seconds: a broken driver may never come back, and a busy machine takes its time
DRAW = """
import sapien
scene = sapien.Scene()
scene.set_ambient_light([1, 1, 1])
builder = scene.create_actor_builder()
builder.add_box_visual(half_size=[1, 1, 1])
builder.build_kinematic("box")
camera = scene.add_camera("camera", 8, 8, 1.0, 0.1, 10)
camera.entity.set_pose(sapien.Pose([-3, 0, 0]))
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color")[4, 4].sum() > 1, "the picture is black"
print(sapien.render.get_device_summary())
"""
TRACE = "from defi.benchmarks.simpler.picture import trace_rays; trace_rays()\n"
MEND = (
    "on a machine with a GPU install its vendor's driver with Vulkan (in a container: the graphics "
    'capability); on another run eval "$(scripts/vulkan_cpu.sh)" first'
)

CLONE = "git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv, and give its folder"


def check_packages() -> None:
    """Raises UserError where one is missing."""
    if missing := [name for name in ("sapien", "ruckig") if find_spec(name) is None]:
        fix = 'pip install -e ".[simpler]" (Linux, Python 3.10 to 3.12)'
        raise UserError(f"SIMPLER needs {' and '.join(missing)}, not installed here; {fix}")


def drawing(*, traced: bool = False) -> str:
    """The device that draws here. Takes seconds: it draws a small picture in a process of its own.

    traced: with rays, as officially.

    Raises:
        UserError: SAPIEN is missing, or cannot draw.
    """
    try:
        command = [sys.executable, "-W", "ignore", "-c", TRACE * traced + DRAW]
        run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(f"SAPIEN drew nothing within {PATIENCE} s; {MEND}") from None
    if run.returncode == 0:
        device = run.stdout.strip().splitlines()[0].removeprefix("GPU: ")
        if traced and "NVIDIA" not in device:  # others leave the noise in, and say nothing
            raise UserError(f"shader=rt: {device} draws here, the denoiser is NVIDIA's; give shader=raster")
        return device
    said = (run.stderr.strip() or "nothing").splitlines()[-1]
    if "ModuleNotFoundError" in said or "ImportError" in said:
        raise UserError(f'SAPIEN 3 is missing ({said}): pip install -e ".[simpler]"')
    if run.returncode < 0:
        said = f"it ended with {signal.Signals(-run.returncode).name}"
    if traced:
        raise UserError(f"shader=rt: SAPIEN cannot ray-trace here ({said}); give shader=raster")
    raise UserError(f"SAPIEN cannot draw ({said}): no working Vulkan driver; {MEND}")


def missing_assets(root: Path, task: Task) -> list[str]:
    """Files that the task's episodes need and the clone lacks, by their names in it.

    Raises:
        UserError: `root` is no clone of SimplerEnv.
    """
    real2sim = "ManiSkill2_real2sim"
    if not (root / real2sim / "data").is_dir():
        raise UserError(f"simpler_root={root}: holds no {real2sim}/data; {CLONE}")
    data, needed = f"{real2sim}/data", {ROBOTS[task.robot].description("")}
    for episode in RULES[task](task):
        needed |= {
            ROBOTS[task.robot].description(episode.colours),
            f"{data}/real_inpainting/{episode.photo}.png",
        }
        needed |= {f"{data}/custom/models/{each.model}/collision.obj" for each in episode.objects}
    if task.stage:
        needed |= {f"{data}/hab2_bench_assets/stages/{task.stage}.glb", f"{data}/custom/{task.models}"}
    else:
        needed.add(f"{data}/custom/mk_station_recolor.urdf")
    if task.robot == "widowx_sink":
        needed.add(f"{data}/custom/models/sink/collision.obj")
    return sorted(name for name in needed if not (root / name).is_file())


def check_assets(root: Path, tasks: Iterable[Task], starts: Iterable[Episode] = ()) -> None:
    """Raises UserError where a file is missing that these tasks, or starts of variant aggregation, need."""
    custom, stages = f"{DATA}/custom", f"{DATA}/hab2_bench_assets/stages"
    missing = {name for task in tasks for name in missing_assets(root, task)}
    needed = {f"{stages}/{each.look.stage}.glb" for each in starts if each.look.stage}
    needed |= {f"{custom}/{each.look.station}.urdf" for each in starts if not each.task.stage}
    needed |= {f"{custom}/models/{placed.model}/collision.obj" for each in starts for placed in each.objects}
    missing |= {name for name in needed if not (root / name).is_file()}
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        fix = f"git -C {root} submodule update --init --recursive"
        raise UserError(f"simpler_root={root}: no {min(missing)}{others}; {fix}")
