"""Which networks belong together."""
