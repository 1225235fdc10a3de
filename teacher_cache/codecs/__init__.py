"""Numbers to small arrays and back, with a declared error. Knows neither blocks nor disks."""
