"""The training engine of every stage.

    loop.py        train(): the loop, one step beside it    run.py         what it holds between steps
    config.py      TrainerConfig: the numbers of a run      model.py       StageModel: what the loop trains
    data.py        batches, random streams of samples       optimizer.py   AdamW, learning rate, averages
    state.py       all that an exact resume needs           checkpoint.py  its folders: found, read, written
    weights.py     tensors in files, read strictly          faults.py      signals, faults in one line
    output.py      output folders, locks, atomic writes     log.py         metrics.jsonl, trackers, terminal
    plot.py        the curves of metrics.jsonl

Import from the modules: this package itself imports nothing, so that commands without a network start fast.
"""
