"""The three console scripts: `kdcache`, `kdtrain` and `kdeval`."""
