"""Messages and interfaces between the coordinator and its hosts."""
