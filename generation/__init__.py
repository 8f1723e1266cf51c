"""From prompts and seeds to image files."""
