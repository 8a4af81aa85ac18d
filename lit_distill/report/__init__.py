"""A test as a report: contenders sampled on the same rows, compared, timed and shown.

The page is one file that opens offline; every figure in it is also in metrics.json.
Must not change what it compares.
"""
