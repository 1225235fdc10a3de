"""What builder and reader agree on: target specs, manifest, streams of vectors, layers, batches. No models."""
