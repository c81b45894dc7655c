"""The run folder: plan, shards, commits; free of Ray and of models."""
