"""Pairs of frames from unlabelled video.

sources/     where frames come from: one module per kind of data set, and all that is known of it
pairs.py     clips → pairs (now, later, text), the data set     resize.py    pictures at the model's size
mixture.py   several data sets, by weight × size                 augment.py   one draw for both frames
build.py     the `data` section of a configuration → data set
"""
