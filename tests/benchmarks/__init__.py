"""Measurements on the full data sets; opt-in, never part of the tests."""
