"""How a zipped network is made: functional difference, matching, and the walk over the layers."""
