"""LoRA: injected into a pipeline, taken out of it, read and written in the names of other tools.

What is written reads back exactly; a file of another model is refused by name.
Must not know training, data sets, or how a student is evaluated.
"""
