"""Demonstrations of the scripted policies in CALVIN's format, as play: `python -m defi.sim.collect`."""
