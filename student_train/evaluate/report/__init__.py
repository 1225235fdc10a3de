"""`kdeval report`: one HTML file per run."""
