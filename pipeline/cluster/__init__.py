"""Ray: replicas, hosts as actors, and the stream of shards."""
