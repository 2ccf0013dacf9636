"""How fast: timing and tuning of candidates."""
