"""What to share and what to drop, for a size or an accuracy floor."""
