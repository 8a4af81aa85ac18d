"""The report of a test: contenders sample the same rows and are measured, timed and shown.

The page is one file that opens offline. Its figures are also in metrics.json.
Must not change what it compares.
"""
