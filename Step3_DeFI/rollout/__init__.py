"""Rollout: a benchmark's episodes in simulation, many simulator processes around one policy per device.

Read evaluate.py first (the command, from settings to results), then simulator.py (one episode in one
environment, in a process of its own), fleet.py (all those processes, observations answered in batches by
`Step3_DeFI.acting`) and results.py (files). config.py has the settings, report.py shows the results. What is
rolled out is a benchmark's: `defi.benchmarks`.
"""
