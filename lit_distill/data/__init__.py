"""The table of pairs and its files: read, checked, put into batches of one size.

Nothing is resized or guessed; whatever is wrong is one error that names rows, columns and values.
Knows no pipeline and no model: a batch is plain data.
"""
