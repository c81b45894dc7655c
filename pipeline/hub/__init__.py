"""Where models come from: found, fetched, converted and described before any weights are loaded."""
