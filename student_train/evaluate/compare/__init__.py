"""`kdeval compare`: runs side by side."""
