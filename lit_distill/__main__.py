"""`python -m lit_distill` is the command `lit-distill`."""

from __future__ import annotations

from lit_distill.cli import main

if __name__ == "__main__":
    main()
