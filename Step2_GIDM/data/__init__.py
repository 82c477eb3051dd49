"""Pairs of frames from unlabelled video.

pairs.py     clips → pairs (now, later, text), the data set     calvin.py    CALVIN-format demonstrations
augment.py   one draw for both frames                            videos.py    any folder of videos
build.py     the `data` section of a configuration → data set
"""
