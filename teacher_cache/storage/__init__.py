"""Objects by key in a folder or a bucket, each there whole or not at all. Does not know what objects mean."""
