"""Pairs of frames from unlabelled video.

sources/    where frames come from: one module per kind of data set, and all that is known of it
pairs.py    clips → pairs (now, later, text), the data set; several of them by weight × size
images.py   pictures at the model's size, one augmentation for both frames
build.py    the `data` section of a configuration → data set
"""
