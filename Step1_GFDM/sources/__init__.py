"""Captioned video of any kind, for `Step1_GFDM.prepare`.

recordings.py   what a source is          settings.py what the user says of it
videos.py       folder and captions       vpp.py      VPP's layout without latents
hdf5.py         teleoperation episodes    rlds.py     RLDS, Open X-Embodiment
calvin.py       demonstrations in CALVIN's format
"""

from Step1_GFDM.sources.build import build_source
from Step1_GFDM.sources.recordings import Recording, Scene, Source
from Step1_GFDM.sources.settings import read_settings

__all__ = ["Recording", "Scene", "Source", "build_source", "read_settings"]
