"""What lives between nodes: models in memory, and what is kept beside them."""
