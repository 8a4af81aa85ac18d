"""Direct Distillation as a LightningModule: student, losses, validation, checkpoints, callbacks.

A resumed run ends as the uninterrupted one; a checkpoint holds what trains and no code.
Must not know how a student is exported or reported on.
"""
