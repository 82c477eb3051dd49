"""SIMPLER (Li et al., 2024): real robots' tasks in simulation, on SAPIEN 3.

`episodes.py` lists the episodes, `environment.py` is the world that a policy acts in, `judge.py` says what
success is. SAPIEN is imported when a world is made.
"""
