"""The commands of `mtz`, one module a command."""
