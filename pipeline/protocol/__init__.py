"""What the coordinator and the hosts say to each other."""
