"""Text to rows of token ids in final order, and their masked views. Knows tokenizers, no models."""
