"""What every part of the project may use; it imports nothing of ours."""
