"""Captioned video of any kind, for `Step1_GFDM.prepare`.

recordings.py   what a source is          calvin.py   demonstrations in CALVIN's format
videos.py       folder and captions       vpp.py      VPP's layout without latents
hdf5.py         teleoperation episodes    rlds.py     RLDS, Open X-Embodiment
"""

from Step1_GFDM.sources.build import build_source
from Step1_GFDM.sources.recordings import Recording, Scene, Source

__all__ = ["Recording", "Scene", "Source", "build_source"]
