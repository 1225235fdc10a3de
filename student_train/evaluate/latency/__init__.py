"""`kdeval latency`: how long a forward pass takes."""
