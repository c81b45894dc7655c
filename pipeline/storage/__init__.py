"""Storage: inputs, plan, shards, commits; free of Ray and of models."""
