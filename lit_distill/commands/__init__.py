"""The subcommands that `lit-distill` adds to Lightning's, one function per file.

A command checks its arguments before any long work; its docstring is its `--help`.
It only calls the other wings: programs need nothing from here.
"""
