"""What lives between nodes: models in memory, and the caches beside them."""
