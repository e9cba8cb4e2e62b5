"""Processes that the flows start: children that end with them, warm interpreters, servers."""
