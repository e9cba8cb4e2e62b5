"""A fleet: its groups, which of them have to run, and the flow that runs them."""
