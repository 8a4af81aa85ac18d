"""The subcommands of `lit-distill` beside Lightning's own, one function a file.

A command checks its arguments before any long work; its docstring is its `--help`.
Only calls what the other wings offer: nothing here is needed by programs.
"""
