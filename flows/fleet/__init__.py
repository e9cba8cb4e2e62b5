"""A fleet: what it consists of tonight, which of its groups have to run, and the flow that runs them."""
