"""lm-evaluation-harness over our engine: in process over its socket, and through the HTTP endpoint."""
