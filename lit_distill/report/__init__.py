"""The report of a test: contenders sample the same rows and are measured, timed and shown.

`lit-distill play` samples with them by hand. The report's page is one file that opens offline. Its figures are also in metrics.json.
Must not change what it compares.
"""
