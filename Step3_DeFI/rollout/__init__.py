"""Rollout: chains of tasks in simulation, many simulator processes around one policy per device.

    python -m Step3_DeFI.rollout checkpoint=<run> [key=value …]        settings: configs/step3_rollout.yaml

    protocol.py     which chains, from which states, with which limits: what makes two numbers comparable
    chain.py        one chain in one world: look, act, judge    simulator.py  the process around it
    messages.py     what the processes tell each other          server.py     looks answered in batches
    fleet.py        all simulator processes of a device, and the queue of chains
    policy.py       a checkpoint as a policy                    evaluate.py   a whole evaluation
    statistics.py   averages, intervals, comparison             results.py    chains.jsonl, results.json
    clips.py        videos of attempts                          report.py     report.html, printed tables

What runs in a simulator process (chain, messages, simulator) does without PyTorch: it starts fast and stays
small.
"""
