"""Pairs of frames from unlabelled video: data sets of any format, `defi.data`.

pairs.py    episodes → pairs (now, later, text), the data set; several of them by weight × size
images.py   pictures at the model's size, one augmentation for both frames
build.py    the `data` section of a configuration → data set
"""
