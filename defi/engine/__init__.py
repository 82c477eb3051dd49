"""The training engine of every stage.

    loop.py        train(): the loop, one step beside it    run.py         what it holds between steps
    config.py      TrainerConfig: the numbers of a run      model.py       StageModel: what the loop trains
    data.py        the order of samples, resumable          shuffle.py     a permutation without memory
    optimizer.py   AdamW and its learning rate              ema.py         averaged weights
    checkpoint.py  folders: found, read, written            resume.py      what an exact resume needs besides
    weights.py     tensors and settings, read strictly      distributed.py processes, FSDP2
    faults.py      not finite, out of memory, lost worker   preemption.py  signals
    log.py         metrics.jsonl, trackers, the terminal    plot.py        its curves
    output.py      output folders, atomic writes

Import from the modules: this package itself imports nothing, so that commands without a network start fast.
"""
