"""What the commands of `mtz` do, one module a command."""
