"""What sampling costs in time and memory: the claims on speed in the README."""
