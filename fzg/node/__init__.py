"""One connection per client: demultiplexing, candidates, path choice (spec connectivity chapters 1, 2, 4)."""
