"""Networks: building, loading and tracing them."""
