"""LoRA: added to a pipeline, extracted from it, read and written in the layouts of other tools.

A file that was written reads back exactly. A file of another model is refused, naming its keys.
Must not know training, data sets, or how a student is evaluated.
"""
