"""The training engine of every stage: one loop, its checkpoints, schedule, EMA, data order and log.

    model.py       StageModel: what the loop trains          config.py    TrainerConfig: the numbers of a run
    loop.py        train(): the loop, one step beside it     data.py      the order of samples, resumable
    checkpoint.py  folders of weights, found and checked     state.py     what an exact resume needs besides
    writer.py      checkpoints written in the background     output.py    output folders, atomic writes
    trouble.py     numbers that are not finite               spikes.py    losses far above the others
    memory.py      whether a micro-batch fits               ema.py schedule.py tracking.py progress.py plot.py

Import from the modules: this package itself imports nothing, so that commands without a network start fast.
"""
