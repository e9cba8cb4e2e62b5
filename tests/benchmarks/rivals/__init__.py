"""Other ways to make several networks small, which the benchmarks compare zipping with; never used by the product."""
