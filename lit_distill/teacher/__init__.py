"""The teacher's side of the pairs: generated and stored, or generated during training.

The same command ends in the same files, however often it is interrupted.
Must not know how the student is trained.
"""
