"""Copies of a run's checkpoints away from its machine, which may lose its disks: uploaded by a thread, brought back.

The folder RUN_NAME at the remote:

    ep3-ba66-<sum>.pt      a checkpoint, named by its epoch, step and contents; a folder of shards is a folder there
    index.json             which of them is latest.pt, previous.pt, best.pt ..., every file's size and SHA-256,
                           recipe.yaml and trackers.json
    index.1.json ...       those of runs of the same name that were begun before

The index is replaced once what it names is whole, so a reader sees the state before or the one after. Names of one
state cost one upload, and giving a state its next name, latest.pt to previous.pt, costs none.
"""
