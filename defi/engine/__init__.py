"""The training engine of every stage.

    loop.py        train(): the loop, one step beside it    run.py         what it holds between steps
    config.py      TrainerConfig: the numbers of a run      model.py       StageModel: what the loop trains
    data.py        batches, random streams of samples       shuffle.py     a permutation without memory
    state.py       all that an exact resume needs           checkpoint.py  its folders: found, read, written
    optimizer.py   AdamW and its learning rate              ema.py         averaged weights
    rng.py         global random generators                 weights.py     tensors in files, read strictly
    distributed.py processes, FSDP2                         preemption.py  signals
    faults.py      what goes wrong, in one line             log.py         metrics.jsonl, trackers, terminal
    output.py      output folders, atomic writes            plot.py        the curves of metrics.jsonl

Import from the modules: this package itself imports nothing, so that commands without a network start fast.
"""
