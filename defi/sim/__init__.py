"""Simulation: one PyBullet play table for the built-in assets and for a clone of CALVIN."""
