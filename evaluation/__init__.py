"""How good images are, whether one solver's are better than another's, and a page that shows it."""
