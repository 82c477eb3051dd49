"""Rollout: chains of tasks in simulation, many simulator processes around one policy per device.

    python -m Step3_DeFI.rollout checkpoint=<run> [key=value …]        settings: configs/step3_rollout.yaml

Read evaluate.py first (from settings to results), then simulator.py (one chain in one world, in a process of
its own), fleet.py (all those processes), policy.py (the checkpoint, observations answered in batches) and
results.py (statistics, files). protocol.py says which chains are run; report.py and videos.py show them.
"""
