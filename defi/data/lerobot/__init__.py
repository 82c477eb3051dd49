"""LeRobot's data sets, versions 2.1 and 3.0, read without LeRobot.

    meta/info.json       version, fps, features, templates of the paths
    meta/tasks.*         the instructions by number; each frame names its own
    meta/episodes*       of each episode its length and, since 3.0, its files and where in them it lies
    data/**.parquet      a row per frame: actions, state, time, number of the instruction, pictures perhaps
    videos/**.mp4        one camera; frame n is shown n / fps seconds after the first

Since 3.0 a file holds many episodes, and each camera is split into files of its own.

meta.py      what meta/ says, and where a data set of the hub lies
rows.py      columns and rows of Parquet files
dataset.py   the format `data.format=lerobot` of all stages; checked when first opened, and indexed
"""

from defi.data.lerobot.dataset import LeRobotData, Settings
from defi.data.lerobot.meta import TASK

__all__ = ["TASK", "LeRobotData", "Settings"]
