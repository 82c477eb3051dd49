"""Pairs of frames from unlabelled video.

pairs.py     clips → pairs (now, later, text), the data set     calvin.py    CALVIN-format demonstrations
mixture.py   several of them, by weight × size                   videos.py    any folder of videos
resize.py    pictures at the model's size                        rlds.py      RLDS, Open X-Embodiment
augment.py   one draw for both frames                            build.py     the `data` section → data set
"""
