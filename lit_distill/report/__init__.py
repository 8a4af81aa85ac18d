"""The report of a test: contenders sample the same rows and are measured, timed and shown.

The report's page is one file that opens offline. Its figures are also in metrics.json. The page of
`lit-distill play` samples prompts by hand. Must not change what it compares.
"""
