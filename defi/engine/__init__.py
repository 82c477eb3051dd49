"""The training engine of every stage.

    loop.py        train(): the loop, one step beside it    run.py         what it holds between steps
    start.py       processes, optimizer, restoring          model.py       StageModel: what the loop trains
    config.py      TrainerConfig: the numbers of a run      schedule.py    the learning rate
    data.py        the order of samples, resumable          shuffle.py     a permutation without memory
    checkpoint.py  folders: found, read, written            resume.py      what an exact resume needs besides
    weights.py     tensors and settings, read strictly      ema.py         averaged weights
    faults.py      not finite, out of memory, lost worker   preemption.py  signals
    log.py         metrics.jsonl, trackers, the terminal    plot.py        its curves
    output.py      output folders, atomic writes            sharding.py    FSDP2

Import from the modules: this package itself imports nothing, so that commands without a network start fast.
"""
