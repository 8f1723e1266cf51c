"""What sampling costs in time and memory: the claims on speed in docs/speed.md."""
