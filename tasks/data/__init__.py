"""Data sets: their layout, reading examples, data that a function gives."""
