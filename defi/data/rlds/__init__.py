"""Robot recordings in RLDS (Open X-Embodiment's format), read without TensorFlow.

tfrecord.py   records with their checksums; the protocol-buffer messages in them
spec.py       features.json and dataset_info.json: what a data set holds, its splits and files
dataset.py    any frame of any episode, by number; the index of where each lies
episodes.py   the format `data.format=rlds` of all stages
write.py      any data set as one in RLDS
"""

from defi.data.rlds.dataset import RLDSDataset, default_splits
from defi.data.rlds.episodes import RLDSData, Settings

__all__ = ["RLDSData", "RLDSDataset", "Settings", "default_splits"]
