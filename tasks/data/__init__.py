"""Data sets: their layout, reading examples, data sets made by functions."""
