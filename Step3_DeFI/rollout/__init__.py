"""Rollout: chains of tasks in simulation, many simulator processes around one policy per device.

Read evaluate.py first (the command, from settings to results), then simulator.py (one chain in one world, in
a process of its own), fleet.py (all those processes, observations answered in batches by
`Step3_DeFI.acting`) and results.py (statistics, files). protocol.py says which chains are run, report.py
shows them.
"""
