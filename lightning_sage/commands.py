"""`lightning-sage`: its own commands, and those of LightningCLI for everything else."""

from __future__ import annotations

import sys
from importlib import import_module

# modules with a main(argv); imported when called for, as each needs other packages
COMMANDS = {
    "compare": "lightning_sage.compare.command",
    "estimate": "lightning_sage.estimate.command",
    "report": "lightning_sage.report.command",
}


def main() -> None:
    """Run the command that the process's arguments name."""
    name, *rest = sys.argv[1:] or [""]
    if name in COMMANDS:
        import_module(COMMANDS[name]).main(rest)
    else:
        import_module("lightning_sage.cli").main()
