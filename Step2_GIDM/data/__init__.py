"""Pairs of frames from unlabelled video.

pairs.py     clips → pairs (now, later, text), the data set     calvin.py    CALVIN-format demonstrations
mixture.py   several of them, by weight × size                   videos.py    any folder of videos
augment.py   one draw for both frames                            rlds.py      RLDS, Open X-Embodiment
build.py     the `data` section of a configuration → data set
"""
