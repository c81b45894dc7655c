"""From a configuration to a running engine, in this process or over Ray."""
